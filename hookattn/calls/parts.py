"""Some batch entries, heads and queries of a call: which positions of each of its fields they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .. import checks
from ..attention.functional import sink_column, with_four_axes
from ..attention.kernel_call import FIELD_SPECS
from ..errors import FieldNotCaptured, SelectionError
from ..statistics.received import Received
from .extents import KeptCall, extents_of, key_heads
from .fields import Derived, Field, Index, PartOf, shape_of, taken
from .mask_rule import MaskRule
from .shard import Shard
from .site import Site

Chosen = int | Sequence[int] | slice | None
Each = TypeVar("Each")
Asked = TypeVar("Asked")


class WholeCall(KeptCall, Protocol):
    """What else is asked of a :class:`~hookattn.calls.call.Call` here."""

    site: Site
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class CallPart:
    """Which positions of a call's axes a part has.

    Attributes:
        batch, head_index, rows, key_head_index: of the B, H, T and G that were kept.
        heads, kv_heads, queries, of_queries: as in a :class:`~hookattn.calls.call.Call`, of the part.
        keys: of the S that were kept.
    """

    batch: Index
    head_index: Index
    rows: Index
    key_head_index: Index
    heads: tuple[int, ...] | None
    kv_heads: tuple[int, ...] | None
    queries: tuple[int, ...] | None
    of_queries: int | None
    keys: slice = field(default_factory=lambda: slice(None))

    @classmethod
    def of(cls, call: WholeCall, heads: Chosen, queries: Chosen, batch: Chosen) -> CallPart:
        """The part of a call with these heads (numbers in the model), queries (places in the call) and batch entries.

        Raises:
            SelectionError: there is no such one. FieldNotCaptured: nothing tells how many there are.
        """
        wanted = "BHGT" if heads is not None else "BHT"
        known = extents_of(call, wanted).known(wanted)

        def extent(letter: str, what: str) -> int:
            if letter not in known:
                raise FieldNotCaptured(f"{call.site.label}: nothing that was captured tells how many {what} it has.")
            return known[letter]

        every = slice(None)
        chosen_batch: Index = every
        if batch is not None:
            entries = range(extent("B", "batch entries"))
            chosen_batch = _index(chosen_positions("batch", batch, entries, call, "batch entries"))
        chosen_rows: Index = every
        numbers, of_queries = call.queries, call.of_queries
        if queries is not None:
            own = call.queries or range(extent("T", "queries"))
            numbers = chosen_positions("queries", queries, own, call, "queries", end_of(call, "T"))
            place = {number: i for i, number in enumerate(own)}
            chosen_rows = _index([place[i] for i in numbers])
            of_queries = call.of_queries if call.queries is not None else len(own)
        if heads is None:
            return cls(chosen_batch, every, chosen_rows, every, call.heads, call.kv_heads, numbers, of_queries)
        h = extent("H", "heads")
        there = call.heads or range(h)
        what = "heads" if call.heads is None else "kept heads"
        named = chosen_positions("heads", heads, there, call, what, end_of(call, "H"))
        at = [there.index(n) for n in named]
        groups: Index = every
        kv_heads: tuple[int, ...] | None = None
        if "G" in known:
            of = key_heads(call, h, known["G"])
            needed = sorted({of[i] for i in at})
            groups = _index(needed)
            reads = tuple(needed.index(of[i]) for i in at)
            even = len(at) % len(needed) == 0 and reads == tuple(i // (len(at) // len(needed)) for i in range(len(at)))
            kv_heads = None if even else reads
        whole = call.heads is None and named == tuple(there)
        return cls(
            chosen_batch, _index(at), chosen_rows, groups, None if whole else named, kv_heads, numbers, of_queries
        )

    @classmethod
    def of_entries(
        cls,
        call: WholeCall,
        entries: Sequence[int],
        rows: Index,
        keys: slice,
        queries: tuple[int, ...] | None,
        of_queries: int | None,
    ) -> CallPart:
        """Batch entries of a call, with all its heads; the arguments are the attributes."""
        every = slice(None)
        return cls(_index(entries), every, rows, every, call.heads, call.kv_heads, queries, of_queries, keys)

    def of_batch(self, of: tuple[Each, ...] | None) -> tuple[Each, ...] | None:
        """What a call says of each of its batch entries, of those of the part."""
        if of is None:
            return None
        return of[self.batch] if isinstance(self.batch, slice) else tuple(of[i] for i in self.batch)

    def field(self, name: str, place: Field) -> Field:
        """Where the part of a field is; nothing is read or derived for it."""
        if place is None or isinstance(place, Derived):
            return place
        if isinstance(place, MaskRule):
            rule = place.of(*(_for_tensor(i, place.device) for i in (self.batch, self.head_index, self.rows)))
            return rule.of_keys(self.keys)
        spec = FIELD_SPECS.get(name)
        if spec is None:  # a statistic: B H T, or B H S, and maybe more
            axes = (self.batch, self.head_index, self.keys if name == Received.name else self.rows)
            return PartOf(place, axes)
        if len(shape_of(place)) == 1:  # a number for each head
            return PartOf(place, (self.head_index,))
        if len(shape_of(place)) < 4:
            tensor = place if isinstance(place, Tensor) else place()
            place = sink_column(tensor) if spec.is_column else with_four_axes(tensor)
        heads = self.key_head_index if spec.per_key_head else self.head_index
        others = {"T": self.rows, "S": self.keys}
        return PartOf(place, (self.batch, heads, *(others[x] for x in spec.axes[2:] if x in others)))


def part_of_scale(scale: float | Tensor | None, part: CallPart) -> float | Tensor | None:
    """The scale of a part: a number, or broadcastable to B H T S; None: there is none."""
    if not isinstance(scale, Tensor):
        return scale
    x = with_four_axes(scale)
    for dim, index in enumerate((part.batch, part.head_index, part.rows, part.keys)):
        x = x if x.shape[dim] == 1 else taken(x, dim, index)
    return x


def end_of(call: WholeCall, axis: str) -> int | None:
    """How many heads (H) or queries (T) the whole model has, of which a process has a part; None: it has all, or that
    is not known."""
    return next((shard.of for shard in call.shards if shard.axis == axis), None)


def chosen_positions(
    name: str, wanted: Chosen, there: Sequence[int], call: WholeCall, what: str, end: int | None = None
) -> tuple[int, ...]:
    """Those of the numbers that are there; negative ones from ``end`` on, or else from the last one.

    Raises:
        SelectionError: one is not there, or none is asked for.
    """
    end = max(there, default=-1) + 1 if end is None else end
    known = there if isinstance(there, range) else frozenset(there)
    if isinstance(wanted, slice):
        found = [i for i in range(*checks.int_slice(name, wanted).indices(end)) if i in known]
        asked: list[int] = found
    else:
        asked = checks.several_ints(name, wanted, "an int, a slice or several ints")
        found = [i + end if i < 0 else i for i in asked]
    if len(set(found)) < len(found):
        raise SelectionError(f"{name}={wanted}: expected each of the {what} once.")
    missing = [a for a, i in zip(asked, found, strict=True) if i not in known]
    if missing or not found:
        raise SelectionError(
            f"{name}={wanted}: {call.site.label} has {what} {listed(there)}"
            + (f", so there is none at {missing[0]}." if missing else ", and none is selected.")
        )
    return tuple(found)


def read_once(wanted: Asked) -> Asked | list[int]:
    """Numbers to choose by, for several calls: a generator would give them to the first alone."""
    return list(wanted) if isinstance(wanted, Iterator) else wanted


def _index(positions: Sequence[int]) -> Index:
    """Positions as what an axis is indexed with: a slice, and so a view, where they are evenly spaced and go up."""
    if len(positions) == 1:
        return slice(positions[0], positions[0] + 1)
    step = positions[1] - positions[0] if positions else 0
    if step > 0 and all(b - a == step for a, b in itertools.pairwise(positions)):
        return slice(positions[0], positions[-1] + 1, step)
    return tuple(positions)


def _for_tensor(index: Index, device: torch.device) -> slice | Tensor:
    return index if isinstance(index, slice) else torch.tensor(index, device=device)


def listed(values: Sequence[object]) -> str:
    """Values for a message, some left out where they are many."""
    shown = [repr(v) for v in values]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:10], "…", shown[-1]])
