"""What was edited in a call: the record of it that a call and its file carry, and which numbers it makes untrue.

An edit of q, k, v, bias, mask or scores is in the fields themselves: what follows from them follows still. Weights that
were edited are no softmax of the scores any more, and an output that was edited is not what the weights make of the
values; there the record alone says which entries are whose.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..attention.kernel_call import FIELD_SPECS
from .fields import Index, taken

Cell = TypeVar("Cell", bound=Hashable)
Chosen = tuple[int, ...] | None

EDITED = ("q", "k", "v", "bias", "mask", "scores", "weights", "output")
"""The fields that an edit can have changed."""

_NAMED = 3  # so many edits are named where a call is shown in a line


@dataclass(frozen=True, slots=True)
class AppliedEdit:
    """One edit of one call, as it was done.

    Attributes:
        edit: which: ``zero``, ``knockout``, …
        field: what it changed, of :data:`EDITED`; a knock-out changes the ``mask``.
        heads: the query heads in the model, of k and v the key heads; None: all.
        queries: the query rows of the call; None: all, or the field has none.
        keys: the keys of the call; None likewise.
        batch: the batch entries; None: all.
        note: what else there is to say: where the values come from.
    """

    edit: str
    field: str
    heads: Chosen = None
    queries: Chosen = None
    keys: Chosen = None
    batch: Chosen = None
    note: str = ""

    def __str__(self) -> str:
        named = [("head", self.heads), ("query", self.queries), ("key", self.keys), ("batch entry", self.batch)]
        where = [f"{name} {_listed(numbers)}" for name, numbers in named if numbers is not None]
        return " ".join(filter(None, (f"{self.edit}({self.field})", ", ".join(where), self.note)))

    def numbered(self, **numbers: Chosen) -> AppliedEdit:
        """The same with other heads, queries, keys or batch entries."""
        return replace(self, **numbers)  # type: ignore[arg-type]

    def of_batch(self, entries: Sequence[int]) -> AppliedEdit | None:
        """What it is of a call of some batch entries, numbered anew; None: it is in none of them."""
        if self.batch is None:
            return self
        kept = tuple(i for i, entry in enumerate(entries) if entry in self.batch)
        return replace(self, batch=kept) if kept else None


def _listed(numbers: tuple[int, ...]) -> str:
    few = [str(n) for n in numbers[:6]]
    return " ".join(few if len(numbers) <= 6 else [*few, "…"])


def edited_entries(
    edits: Sequence[AppliedEdit],
    field: str,
    shape: tuple[int, int, int, int],
    device: torch.device,
    heads: Chosen = None,
    queries: Chosen = None,
) -> Tensor | None:
    """Which entries of a field were edited; None: none was.

    Args:
        edits: of the call.
        field: ``scores`` or ``weights`` (B H T S), or ``output`` (B H T E).
        shape: B, H, T and the last extent of what was kept.
        device: where the answer is made.
        heads: the numbers of the H heads; None: 0 to H − 1.
        queries: those of the T queries; likewise.

    Returns:
        bool, broadcastable to the field.
    """
    found: Tensor | None = None
    for edit in edits:
        if edit.field != field:
            continue
        axes = (edit.batch, _places(edit.heads, heads), _places(edit.queries, queries), edit.keys)
        entries = torch.ones((), dtype=torch.bool, device=device)
        for dim, (chosen, extent) in enumerate(zip(axes, shape, strict=True)):
            line = torch.full((extent if chosen is not None else 1,), chosen is None, device=device)
            if chosen is not None:
                line[list(chosen)] = True
            entries = entries & line.view((1,) * dim + (-1,) + (1,) * (3 - dim))
        found = entries if found is None else found | entries
    return found


def _places(chosen: Chosen, kept: Chosen) -> Chosen:
    """The places among the kept ones."""
    if chosen is None or kept is None:
        return chosen
    return tuple(i for i, number in enumerate(kept) if number in chosen)


def edits_of_batch(edits: tuple[AppliedEdit, ...], index: Index, batch: int) -> tuple[AppliedEdit, ...]:
    """The edits of some batch entries of a call that has ``batch`` of them."""
    if all(edit.batch is None for edit in edits):
        return edits
    entries = taken(torch.arange(batch), 0, index).tolist()
    return tuple(made for edit in edits if (made := edit.of_batch(entries)) is not None)


def set_by_edits(edits: Iterable[AppliedEdit], field: str) -> bool:
    """Whether entries of a field were set by edits, so that they do not follow from what they follow from elsewhere."""
    return any(edit.field == field for edit in edits)


def edits_in_words(edits: Iterable[AppliedEdit]) -> str:
    """``edited: zero(weights) head 1``, of one or several calls; empty: nothing was edited."""
    told = list(dict.fromkeys(map(str, edits)))
    if not told:
        return ""
    rest = f" and {len(told) - _NAMED} more" if len(told) > _NAMED else ""
    return f"edited: {'; '.join(told[:_NAMED])}{rest}"


def put_together(
    several: Iterable[Sequence[tuple[AppliedEdit, set[Cell]]]],
    back: Callable[[AppliedEdit, set[Cell]], Iterable[AppliedEdit]],
) -> tuple[AppliedEdit, ...]:
    """The edits of several calls that become one.

    Args:
        several: of each call its edits in their order, each without the numbers along the axis that is put together,
            and the entries along it that it was done in, as the whole counts them.
        back: writes the entries of an edit of the whole into it; more than one, where one cannot say it.

    Returns:
        Those that differ in nothing else as one, in an order that is that of each call.
    """
    whole: list[tuple[Hashable, AppliedEdit, set[Cell]]] = []
    for edits in several:
        place, times = 0, dict[AppliedEdit, int]()
        for edit, cells in edits:
            times[edit] = times.get(edit, 0) + 1  # one that was done twice stands there twice
            key = edit, times[edit]
            found = next((i for i in range(place, len(whole)) if whole[i][0] == key), None)
            if found is None:
                whole.insert(place, (key, edit, set(cells)))
                found = place
            else:
                whole[found][2].update(cells)
            place = found + 1
    return tuple(made for _, edit, cells in whole for made in back(edit, cells))


def numbered_together(
    name: str,
    letters: str,
    several: Iterable[tuple[Sequence[AppliedEdit], Callable[[AppliedEdit], Iterable[int]], int]],
    whole: Callable[[AppliedEdit], int | None],
) -> tuple[AppliedEdit, ...]:
    """The edits of several calls that are put together along one axis, in the numbers of the whole.

    Args:
        name: what an edit calls its numbers along the axis: ``heads``, ``queries`` or ``batch``.
        letters: of the axis, one or more; a field that has none of them has no such numbers.
        several: of each call its edits; which numbers of the whole all of an edited field are there, none where that is
            not known; and what is added to its own numbers to make them the whole's.
        whole: how many the whole has, for an edit; None: that is not known.
    """
    told = []
    for edits, all_of, start in several:
        own = []
        for edit in edits:
            chosen: Chosen = getattr(edit, name)
            cells = set(all_of(edit)) if chosen is None else {start + i for i in chosen}
            own.append((edit.numbered(**{name: None}), cells))
        told.append(own)

    def written(edit: AppliedEdit, cells: set[int]) -> list[AppliedEdit]:
        along = any(letter in FIELD_SPECS[edit.field].axes for letter in letters)
        some = along and cells and len(cells) != whole(edit)
        return [edit.numbered(**{name: tuple(sorted(cells))}) if some else edit]

    return put_together(told, written)
