"""Which part of an attention a call has, where several processes each compute a part of it."""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks
from ..errors import InputError

SHARDED_AXES = ("B", "H", "T")
"""The axes that an attention can be cut along: batch entries, heads, query positions."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of an axis that one process has of an attention. What of that part was selected is told by the call's
    ``heads`` and ``queries``, which are numbers in the whole model.

    Attributes:
        axis: ``"H"``, its heads (tensor parallelism), ``"T"``, its query positions (sequence or context parallelism),
            or ``"B"``, its batch entries (data parallelism).
        start: the number, in the whole model, of the first that is here; None: that is not known.
        of: how many the whole model has; None: that is not known.
        group_start: of heads, the number in the whole model of the first key/value head that is here; None: of
            another axis, or that is not known.
        groups_of: of heads, how many key/value heads the whole model has; None likewise.
        mesh: the name of the dimension of the device mesh along which it is cut (``"tp"``); empty: it has none.
        index: which of the processes on that dimension this is, from 0.
        count: how many these are.

    Raises:
        InputError: one of these is something else, or they contradict each other.
    """

    axis: str
    start: int | None
    of: int | None
    group_start: int | None = None
    groups_of: int | None = None
    mesh: str = ""
    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        checks.word("Shard: axis", self.axis, SHARDED_AXES)
        checks.text("Shard: mesh", self.mesh)
        for name, least in (("start", 0), ("of", 1), ("group_start", 0), ("groups_of", 1)):
            value = getattr(self, name)
            if value is not None:
                self._keep(name, value, least)
        self._keep("index", self.index, 0)
        self._keep("count", self.count, 1)
        for first, whole in (("start", "of"), ("group_start", "groups_of"), ("index", "count")):
            a, b = getattr(self, first), getattr(self, whole)
            if a is not None and b is not None and a >= b:
                raise InputError(f"Shard: {first}={a} of {whole}={b}: numbers are from 0 to {b - 1}.")
        if self.axis != "H" and (self.group_start, self.groups_of) != (None, None):
            raise InputError(f"Shard: group_start= and groups_of= are of heads, and axis is {self.axis!r}.")

    def _keep(self, name: str, value: int, least: int) -> None:
        """A number as a plain int, whatever library's it was."""
        object.__setattr__(self, name, checks.whole(f"Shard: {name}", value, least, error=InputError))

    def __str__(self) -> str:
        """For a person: ``heads from 2 of 4, rank 1 of 2 on tp``."""
        what = {"H": "heads", "T": "queries", "B": "batch entries"}[self.axis]
        where = "whose numbers are not known" if self.start is None else f"from {self.start}"
        of = "" if self.of is None else f" of {self.of}"
        return f"{what} {where}{of}, rank {self.index} of {self.count}" + (f" on {self.mesh}" if self.mesh else "")
