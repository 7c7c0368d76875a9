"""What was edited in the pieces of one attention, in the numbers of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..attention.kernel_call import FIELD_SPECS
from ..attention.pieces import Piece
from ..calls.call import Call
from ..calls.edits import AppliedEdit, Chosen, put_together
from ..calls.extents import extents_of

_NAMES = {"B": "batch", "H": "heads", "T": "queries"}

Cell = tuple[int, int, int]
"""A batch entry, head and query of the whole; 0 where nothing was cut along the axis."""


def edits_of_pieces(calls: Sequence[Call], pieces: Sequence[Piece]) -> tuple[AppliedEdit, ...]:
    """The edits of the call that some pieces make.

    Args:
        calls: the pieces, which are all of the whole.
        pieces: which part of it each is.
    """
    if not any(c.edits for c in calls):
        return ()
    cut = [_Cut(call, piece) for call, piece in zip(calls, pieces, strict=True)]
    return put_together([[one.of_whole(edit) for edit in one.edits] for one in cut], cut[0].written)


class _Cut:
    """One piece, and what its numbers are in the whole."""

    def __init__(self, call: Call, piece: Piece) -> None:
        known = extents_of(call, "BHG").known("BHG")
        self.edits, self.piece, self.letters = call.edits, piece, piece.letters
        self.b, self.h = known["B"], known["H"]
        self.groups = self.h // known.get("G", self.h)
        self.first_head = (piece.place("H", self.h) or (0, self.h))[0]
        # What this process has of the whole begins there, where others have the rest.
        starts = {shard.axis: shard for shard in call.shards}
        heads, rows = starts.get("H"), starts.get("T")
        self.heads_from = 0 if heads is None else heads.start or 0
        self.groups_from = 0 if heads is None else heads.group_start or 0
        self.rows_from = 0 if rows is None else rows.start or 0

    def of_whole(self, edit: AppliedEdit) -> tuple[AppliedEdit, set[Cell]]:
        """An edit without its numbers along what was cut, and the cells of the whole that it was done in."""
        start, axes = self.piece.start, FIELD_SPECS[edit.field].axes
        plain = edit.numbered(**{_NAMES[x]: None for x in self.letters})
        entries = range(self.b) if edit.batch is None else edit.batch
        if self.letters == "B":
            return plain, {(start + b, 0, 0) for b in entries}
        if self.letters == "H":
            return plain, {(0, start + h, 0) for h in self._heads(edit)}
        if self.letters == "T":
            own = None if edit.queries is None else [i - self.rows_from for i in edit.queries]
            rows = range(start, self.piece.stop) if own is None else own
            return plain, {(0, 0, row) for row in rows} if "T" in axes else {(0, 0, 0)}
        inner = self.piece.axes[1][1]
        places = [divmod(start + b * self.h + h, inner) for b in entries for h in self._heads(edit)]
        return plain, {(x, y, 0) if self.letters == "BH" else (y, x, 0) for x, y in places}

    def _heads(self, edit: AppliedEdit) -> list[int]:
        """The places in the piece of the query heads of an edit; of one of key heads, of those that read them."""
        if edit.heads is None:
            return list(range(self.h))
        if "H" in FIELD_SPECS[edit.field].axes:
            return [h - self.heads_from - self.first_head for h in edit.heads]
        first = self.groups_from + self.first_head // self.groups
        return [h for h in range(self.h) if first + h // self.groups in edit.heads]

    def written(self, edit: AppliedEdit, cells: set[Cell]) -> Iterator[AppliedEdit]:
        """An edit of the whole in these cells: one for all batch entries that have the same heads."""
        if len(cells) == self.piece.of:
            yield edit
        elif len(self.letters) == 1:
            at = "BHT".index(self.letters)
            of_queries = self.letters == "T" and "T" not in FIELD_SPECS[edit.field].axes
            begins = {"B": 0, "H": self.heads_from, "T": self.rows_from}[self.letters]
            numbers = tuple(sorted(begins + c[at] for c in cells))
            yield edit if of_queries else edit.numbered(**{_NAMES[self.letters]: numbers})
        else:
            sizes = dict(self.piece.axes)
            heads_of: dict[int, list[int]] = {}
            for entry, head, _ in sorted(cells):
                heads_of.setdefault(entry, []).append(self.heads_from + head)
            entries_of: dict[tuple[int, ...], list[int]] = {}
            for entry, heads in heads_of.items():
                entries_of.setdefault(tuple(heads), []).append(entry)
            for several, entries in entries_of.items():
                yield edit.numbered(heads=_or_all(several, sizes["H"]), batch=_or_all(entries, sizes["B"]))


def _or_all(numbers: Sequence[int], extent: int) -> Chosen:
    return None if len(numbers) == extent else tuple(numbers)
