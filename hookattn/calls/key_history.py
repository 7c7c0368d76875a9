"""The keys, or the values, of one site through the steps of a generation, each kept once.

A step of a generation has the keys of the step before and a few of its own. :class:`KeyHistory` holds the own ones of
all steps in one run, and each step's keys are a stretch of it (:class:`Continued`), which reading gives as a whole.
That a step begins with the keys of the one before is compared, never assumed; where it does not, it is kept whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Size, Tensor

from ..torch_internals.isolation import isolated
from ..torch_internals.lazy_copies import snapshots
from .site import Site

# A run that is full is moved to one that is larger by this part: moving costs less than one copy a row then.
_GROWTH = 1.5
_ANY = torch.empty(0)


@dataclass(frozen=True, slots=True)
class Link:
    """How the keys of one step go on from those of the step before.

    Attributes:
        batch: for each batch entry, which one of the step before it goes on from; None: its own. Beams reorder them.
        dropped: how many of the first keys of the step before are left out, in a window that has moved on.
        at: where the step's own keys are among all its keys: behind the others, or in the empty end of a static cache.
        count: how many own keys it has.
    """

    batch: tuple[int, ...] | None
    dropped: int
    at: int
    count: int


class _Step(NamedTuple):
    """Where the keys of one step are.

    Attributes:
        link: how it goes on; None: the first step.
        start, stop: which stretch of the run.
        tail: how many keys of the end of a static cache follow, which no step has written to yet.
    """

    link: Link | None
    start: int
    stop: int
    tail: int


class KeyHistory:
    """Keys of one site, of one step after the other.

    Args:
        first: B G S D, those of the first step; nobody writes to it.
    """

    def __init__(self, first: Tensor):
        self._run, self._end = first, first.shape[2]  # B G (room) D, of which so many keys are there
        self._ours = False  # whether the run's memory is this history's own, with room behind its end
        self._rest: Tensor | None = None  # B G n D: the end of a static cache, as the first step has it
        self._steps = [_Step(None, 0, first.shape[2], 0)]
        self._reordered = False

    def __len__(self) -> int:
        return len(self._steps)

    def link(self, step: int) -> Link | None:
        """How a step goes on from the one before; None: it is the first."""
        return self._steps[step].link

    def own(self, step: int) -> Tensor:
        """B G n D: the keys that a step has itself; of the first, all."""
        found = self._steps[step]
        if found.link is None:
            return self.keys(step)
        return self._run[:, :, found.stop - found.link.count : found.stop]

    def shape(self, step: int) -> Size:
        """B G S D of a step."""
        found = self._steps[step]
        b, g, _, d = self._run.shape
        return Size((b, g, found.stop - found.start + found.tail, d))

    @property
    def dtype(self) -> torch.dtype:
        """That of the keys."""
        return self._run.dtype

    def keys(self, step: int) -> Tensor:
        """B G S D: all keys of a step; the reader may write to it."""
        found = self._steps[step]
        body = self._body(step)
        if found.tail:
            assert self._rest is not None
            return torch.cat([body, self._rest[:, :, self._rest.shape[2] - found.tail :]], 2)
        return body

    def _body(self, step: int) -> Tensor:
        found = self._steps[step]
        if not self._reordered:
            return snapshots([self._run[:, :, found.start : found.stop]], [False])[0]
        # From this step back: which batch entry of the run each of its keys is of.
        entries: Sequence[int] = range(self._run.shape[0])
        of_steps, counts = [], []
        for i in range(step, -1, -1):
            link = self._steps[i].link
            of_steps.append(entries)
            counts.append(self._steps[i].stop if link is None else link.count)
            if link is not None and link.batch is not None:
                entries = [link.batch[entry] for entry in entries]
        of_keys = torch.tensor(of_steps[::-1]).repeat_interleave(torch.tensor(counts[::-1]), 0)
        index = of_keys.T[:, found.start :].to(self._run.device)
        places = torch.arange(found.start, found.stop, device=self._run.device)
        return self._run[index, :, places].transpose(1, 2)

    # One step more

    def goes_on(self, keys: Tensor) -> bool:
        """Take the keys of the next step; False: they don't go on from those of the last one, and nothing is taken.

        Args:
            keys: B G S D.
        """
        link = self._link_to(keys)
        if link is None:
            return False
        self.extend(link, keys[:, :, link.at : link.at + link.count])
        return True

    def extend(self, link: Link, own: Tensor) -> None:
        """One step more.

        Args:
            link: how it goes on from the last one.
            own: B G n D, its own keys.
        """
        last = self._steps[-1]
        tail = last.tail
        if link.count and link.at < last.stop - last.start + last.tail - link.dropped:  # in the end of a static cache
            if self._rest is None:
                self._rest = self._run[:, :, last.start + link.at : last.stop].clone()
                self._end = last.start + link.at
                last = self._steps[-1] = last._replace(stop=self._end, tail=self._rest.shape[2])
            tail = last.tail - link.count
        self._append(own)
        self._reordered |= link.batch is not None
        self._steps.append(_Step(link, last.start + link.dropped, last.stop + link.count, tail))

    def _append(self, own: Tensor) -> None:
        if not own.shape[2]:
            return
        end = self._end + own.shape[2]
        if not self._ours or end > self._run.shape[2]:
            b, g, _, d = self._run.shape
            with torch.inference_mode(False):  # else nobody could write to it once the mode that is on now has ended
                wider = torch.empty(b, g, int(end * _GROWTH), d, dtype=self._run.dtype, device=self._run.device)
            wider[:, :, : self._end] = self._run[:, :, : self._end]
            self._run, self._ours = wider, True
        self._run[:, :, self._end : end] = own
        self._end = end

    def _link_to(self, keys: Tensor) -> Link | None:
        """How keys go on from those of the last step; None: they do not."""
        last = self.shape(len(self._steps) - 1)
        if keys.dtype != self._run.dtype or keys.device != self._run.device or keys.dim() != 4:
            return None
        if (keys.shape[0], keys.shape[1], keys.shape[3]) != (last[0], last[1], last[3]):
            return None
        more = keys.shape[2] - last[2]
        before = self._last()
        if more > 0 and self._steps[-1].tail:
            return None  # a static cache that became longer while its end was still empty
        if more > 0:
            if torch.equal(keys[:, :, : last[2]], before):
                return Link(None, 0, last[2], more)
            order = _order(keys[:, :, : last[2]], before)
            return None if order is None else Link(order, 0, last[2], more)
        if more < 0:
            return None
        if torch.equal(keys, before):  # those of another sequence, which every step attends to
            return Link(None, 0, last[2], 0)
        return self._in_place(keys, before) or self._moved_on(keys, before)

    def _last(self) -> Tensor:
        """The keys of the last step, to be read alone."""
        last = self._steps[-1]
        if self._reordered or last.tail:
            return self.keys(len(self._steps) - 1)
        return self._run[:, :, last.start : last.stop]

    def _in_place(self, keys: Tensor, before: Tensor) -> Link | None:
        """Keys that were written into the empty end of a static cache, behind those of the last step."""
        last = self._steps[-1]
        places = (keys != before).flatten(0, 1).any(0).any(-1).nonzero().flatten()
        at, end = int(places[0]), int(places[-1]) + 1
        if not at:  # all is new
            return None
        # What was written before is written to no more, so that the run has it for all steps.
        behind = self._rest is None or at >= last.stop - last.start
        if not behind or (self._rest is None and len(self._steps) > 1):
            return None
        if self._rest is not None and at > last.stop - last.start:
            at = last.stop - last.start  # keys that stayed as they were are its own, too
        return Link(None, 0, at, end - at)

    def _moved_on(self, keys: Tensor, before: Tensor) -> Link | None:
        """Keys of a window that has moved on by a few."""
        last = self._steps[-1]
        if last.tail or keys.shape[2] < 2:
            return None
        s = keys.shape[2]
        # The first key that stays says by how many: it is compared with all, and then the rest with the rest.
        first = (before == keys[:, :, :1]).flatten(0, 1).all(0).all(-1)
        for dropped in first.nonzero().flatten().tolist():
            if dropped and torch.equal(keys[:, :, : s - dropped], before[:, :, dropped:]):
                return Link(None, dropped, s - dropped, dropped)
        return None


def _order(keys: Tensor, before: Tensor) -> tuple[int, ...] | None:
    """For each batch entry the one of ``before`` that it is the same as; None: one is the same as none."""
    order = []
    for entry in keys.unbind(0):
        found = next((i for i, other in enumerate(before.unbind(0)) if torch.equal(entry, other)), None)
        if found is None:
            return None
        order.append(found)
    return tuple(order)


@dataclass(frozen=True, slots=True)
class Continued:
    """The keys, or the values, of one step of a history.

    Attributes:
        history: of all steps.
        step: which one, counted in the history.
    """

    history: KeyHistory
    step: int

    def __call__(self) -> Tensor:
        """B G S D: all of them."""
        return self.history.keys(self.step)

    @property
    def shape(self) -> Size:
        """B G S D; nothing is put together for it."""
        return self.history.shape(self.step)


def joined(first: Tensor, parts: Sequence[tuple[Link, Tensor]]) -> KeyHistory:
    """The history of the keys of a first step, B G S D, and of the links and own keys, B G n D, of the others."""
    made = KeyHistory(first)
    for link, own in parts:
        made.extend(link, own)
    return made


class KeptCall(Protocol):
    """What is asked of a :class:`~hookattn.calls.call.Call` here."""

    site: Site
    step: int
    fields: dict[str, Any]


class KeyHistories:
    """Finds the steps of a generation among the calls of a trace, and puts their keys and values into histories."""

    def __init__(self) -> None:
        # Weak references: keys that nobody holds any more are compared with nothing.
        self._last: dict[tuple[str, str, int], weakref.ref[KeptCall]] = {}
        self._new: list[weakref.ref[KeptCall]] = []
        self._due = False
        self._step = -1
        self._runs: dict[tuple[str, str], int] = {}

    def note(self, call: KeptCall, goes_on: bool) -> None:
        """A call whose keys and values will be looked at.

        Args:
            call: the call.
            goes_on: whether it may have keys of a step before. A sequence that has a query for every key has none.
        """
        self._new.append(weakref.ref(call))
        self._due |= goes_on

    def look(self) -> None:
        """Look at the calls that were noted since the last time, in their order.

        Comparing reads from the device, and so waits for it: between two steps that costs the least.
        """
        if not self._due:  # the first step of a generation is remembered for the second
            return
        self._due = False
        new, self._new = self._new, []
        with isolated(_ANY):
            for ref in new:
                if (call := ref()) is not None:
                    self.take(call)

    def take(self, call: KeptCall) -> None:
        """Exchange the keys and values of a call for the step of a history that they are, if they go on from any."""
        if call.step != self._step:
            self._step = call.step
            self._runs.clear()
        place = call.site.path, call.site.kind
        run = self._runs.get(place, 0)
        key = *place, run  # a module that runs several times in a forward is as many sites
        self._runs[place] = run + 1
        known, self._last[key] = self._last.get(key), weakref.ref(call)
        before = None if known is None else known()
        if before is None or before.step == call.step:
            return
        for name in ("k", "v"):
            earlier, now = before.fields.get(name), call.fields.get(name)
            if isinstance(now, partial):  # it arrives from a GPU
                now = now()
            if not isinstance(now, Tensor) or now.dim() != 4:
                continue
            if isinstance(earlier, partial):
                earlier = earlier()
            if isinstance(earlier, Tensor) and earlier.dim() == 4:
                history, step = KeyHistory(earlier), 0
            elif isinstance(earlier, Continued) and earlier.step == len(earlier.history) - 1:
                history, step = earlier.history, earlier.step
            else:
                continue
            if history.goes_on(now):
                before.fields[name] = Continued(history, step)
                call.fields[name] = Continued(history, step + 1)
