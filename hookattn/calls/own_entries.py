"""Some entries of a batch that was filled up, each as long as it is itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from ..attention.ragged import Length, lengths_by_mask, notes_of_entries
from ..errors import FieldNotCaptured
from .call import Call, part_of
from .extents import extents_of
from .fields import Index
from .parts import CallPart

Whole = TypeVar("Whole", bound=Call)


def lengths_of_entries(call: Call) -> tuple[Length, ...]:
    """For each batch entry of a call how many queries and keys are its own: as it was recorded, or as its mask tells.

    Raises:
        FieldNotCaptured: nothing that was kept tells.
    """
    if call.lengths is not None:
        return call.lengths
    known = extents_of(call, "BTS")
    rows = known.t if call.queries is None else call.of_queries
    if known.b is None or known.t is None or known.s is None or rows is None or not call.has("mask"):
        raise FieldNotCaptured(
            f"{call.site.label}: how many queries and keys of step {call.step} are each batch entry's own is not "
            f"known; trace again with capture={(*call.captured, 'mask')!r}."
        )
    found = lengths_by_mask(call.mask, known.b, known.t, known.s)
    # Of selected rows nobody knows which of the others fill up.
    return found if call.queries is None else tuple((rows, s) for _, s in found)


def own_entries(call: Whole, entries: Sequence[int]) -> Whole | None:
    """A part of a call: some batch entries, without what fills them up to the longest of the batch.

    Nothing is read or derived for it, but a mask, where that alone tells how long each is.

    Args:
        call: the call.
        entries: which, in their order.

    Returns:
        A call of the same site and step, whose T and S are those of the longest of these entries; None: none of the
        queries that were kept is theirs.

    Raises:
        FieldNotCaptured: as :func:`lengths_of_entries`.
    """
    lengths = lengths_of_entries(call)
    own = tuple(lengths[i] for i in entries)
    t, s = max(n for n, _ in own), max(n for _, n in own)
    rows: Index = slice(0, t)
    numbers: tuple[int, ...] | None = None
    of_queries = None
    if call.queries is not None:
        rows = tuple(i for i, number in enumerate(call.queries) if number < t)
        numbers, of_queries = tuple(call.queries[i] for i in rows), t
    if not t or numbers == ():
        return None
    made = part_of(call, CallPart.of_entries(call, entries, rows, slice(0, s), numbers, of_queries))
    notes = tuple(notes_of_entries(call.notes, own))
    return replace(made, lengths=own, notes=notes, keys=None if call.keys is None else s)
