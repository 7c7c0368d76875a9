"""Where a call is in the whole attention, of which it may be a part: a piece that the model computes by itself
(:class:`~hookattn.attention.pieces.Piece`), and what one process has of it (:class:`~hookattn.attention.pieces.Cut`).

All that selects heads and queries by their numbers in the model asks this: what is kept, and what is edited.
"""

from __future__ import annotations

from dataclasses import dataclass

from .kernel_call import KernelCall
from .pieces import Cut


@dataclass(frozen=True, slots=True)
class Axis:
    """The positions that a call has of one axis of the whole attention.

    Attributes:
        first: the number of the first of them; None: they have none.
        count: how many the call has.
        of: how many the whole has; None: that is not known.
        elsewhere: whether other processes have, or may have, the others.
    """

    first: int | None
    count: int
    of: int | None
    elsewhere: bool = False

    @property
    def whole(self) -> bool:
        """Whether the call has all there are."""
        return self.count == self.of

    def has(self, number: int) -> bool:
        """Whether the call has a position, by its number in the whole."""
        return self.first is not None and 0 <= number - self.first < self.count

    def within(self, cut: Cut | None) -> Axis:
        """The axis in the numbers of all processes, where this one has a part."""
        if cut is None:
            return self
        known = self.first is not None and cut.start is not None
        first = self.first + cut.start if self.first is not None and cut.start is not None else None
        return Axis(first if known else None, self.count, cut.of, True)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a call is in the whole attention.

    Attributes:
        batch, heads, key_heads: of these axes.
        rows: of the queries.
    """

    batch: Axis
    heads: Axis
    key_heads: Axis
    rows: Axis

    @classmethod
    def of(cls, call: KernelCall) -> Place:
        """Of a call. Batch entries are counted in this process: each has a batch of its own."""
        place = cls._in_process(call)
        cuts = call.cuts
        if not cuts:
            return place
        heads = cuts.get("H")
        groups = cuts.get("G", None if heads is None else Cut(None, None))
        return cls(
            place.batch,
            place.heads.within(heads),
            place.key_heads.within(groups),
            place.rows.within(cuts.get("T")),
        )

    @classmethod
    def _in_process(cls, call: KernelCall) -> Place:
        b, h, t, _ = call.shape
        g = next((x.shape[1] for x in (call.k, call.v) if x is not None), h)
        piece = call.piece
        if piece is None:
            return cls(Axis(0, b, b), Axis(0, h, h), Axis(0, g, g), Axis(0, t, t))
        batch, heads = Axis(0, b, b), Axis(0, h, h)
        if piece.letters == "B":
            batch = Axis(piece.start, b, piece.of)
        elif piece.letters in ("BH", "HB"):
            sizes = dict(piece.axes)
            batch, heads = Axis(None, b, sizes["B"]), Axis(None, h, sizes["H"])
            inner = piece.axes[1][1]
            first, start = divmod(piece.start, inner)
            if piece.letters == "BH" and (place := piece.place("H", h)) is not None:
                batch, heads = Axis(first, b, sizes["B"]), Axis(place[0], h, place[1])
            elif piece.letters == "HB" and (start, b) in ((0, inner), (start, 1)):
                batch, heads = Axis(start, b, sizes["B"]), Axis(first, h, sizes["H"])
        elif piece.letters == "H":
            heads = Axis(piece.start, h, piece.of)
        per = h // g
        of = heads.of
        key_heads = Axis(None if heads.first is None else heads.first // per, g, None if of is None else of // per)
        first_row, all_rows = piece.place("T", t) or (0, t)
        return cls(batch, heads, key_heads, Axis(first_row, t, all_rows))
