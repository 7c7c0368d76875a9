"""Keys and values that go on from those of an earlier call: which of them a file may say so of, and how.

A file says of such a field which keys it takes from the earlier call's and which rows are its own. These make chains:
a field is gone on from once at most, by a later call, and never in a circle. :class:`Chain` knows what may come next in
one, so that whatever is in a file can be read by :class:`~.stored_history.StoredHistory`, and whatever is written by
:class:`WrittenSteps` is what a file may have.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

from ..calls.key_history import Continued, KeyHistory, Link

LINKED = ("k", "v")
"""The fields that may go on from those of an earlier call."""


class StoredLink(NamedTuple):
    """How a field goes on from that of an earlier call, as the document says it.

    Attributes:
        continues: which call, by its place among all calls.
        batch, dropped, at: as in a :class:`~hookattn.calls.key_history.Link`.
        tensor: the name of the call's own rows, B G n D; None: it has none.
    """

    continues: int
    batch: tuple[int, ...] | None
    dropped: int
    at: int
    tensor: str | None


class Chain:
    """The extents of one field from call to call, as far as they say what may come next.

    Args:
        b, s: batch entries and keys of the first call, which has its field whole.
    """

    def __init__(self, b: int, s: int):
        self.b, self.s = b, s
        self._first = True  # whether nothing has gone on from the first call yet
        self._end: int | None = None  # where the rows end that were written into the empty end of a static cache

    def problem(self, link: Link) -> str | None:
        """Why a link cannot come next; None: it can."""
        batch, dropped, at, count = link.batch, link.dropped, link.at, link.count
        if batch is not None and (len(batch) != self.b or any(not 0 <= i < self.b for i in batch)):
            return f"'batch' is {list(batch)[:12]}, expected {self.b} numbers below {self.b}"
        if not 0 <= dropped <= self.s:
            return f"'dropped' is {dropped}, and the field it continues has {self.s} keys"
        rest, filling = self.s - dropped, self._end is not None and self._end < self.s
        if at > rest or at < 0:
            return f"'at' is {at}, and {rest} keys are there"
        if at < rest or filling:
            if batch is not None or dropped:
                return "a field that is written to in its middle takes all keys and batch entries as they are"
            if count and at != self._end and not self._first:
                return f"'at' is {at}, expected {self.s if self._end is None else self._end}: behind the rows before"
        if at < rest and (at + count > self.s or not count):
            return f"'at' is {at}, where {count} rows do not go into {self.s} keys"
        return None

    def add(self, link: Link) -> None:
        """One call more, by a link that has no problem."""
        rest = self.s - link.dropped
        if link.count and link.at < rest:
            self._end = link.at + link.count
        elif link.count or link.dropped:
            self._end = None
        self._first = False
        self.s = max(rest, link.at + link.count)


class WrittenSteps:
    """The steps of histories that were written to a file, of which the next one may go on."""

    def __init__(self) -> None:
        # With its history, since the identity of one that is gone may be another's; weakly, as a history may be large.
        self._written: dict[tuple[int, int], tuple[weakref.ref[KeyHistory], int, Chain]] = {}

    def whole(self, place: Continued, number: int) -> None:
        """A step was written whole.

        Args:
            place: the step.
            number: of the call.
        """
        b, _, s, _ = shape = place.shape
        if 0 not in shape:  # a file says of an empty tensor that it is empty, and no more
            self._written[id(place.history), place.step] = weakref.ref(place.history), number, Chain(b, s)

    def linked(self, place: Continued, number: int) -> tuple[int, Link] | None:
        """What a step that is written now goes on from, the number of a call, and how; None: it has to be whole."""
        key = id(place.history), place.step - 1
        link = place.history.link(place.step)
        if link is None or key not in self._written:
            return None
        history, before, chain = self._written[key]
        if history() is not place.history or chain.problem(link) is not None:
            return None
        del self._written[key]  # nothing else goes on from it
        chain.add(link)
        self._written[id(place.history), place.step] = history, number, chain
        return before, link
