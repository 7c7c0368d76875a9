"""Which part of one attention a call is, where a model computes it piece by piece, in the numbers of the whole."""

from __future__ import annotations

from dataclasses import dataclass

from ..attention.kernel_call import KernelCall
from ..errors import EditError
from .where import chosen


@dataclass(frozen=True, slots=True)
class Axis:
    """The positions that a call has of one axis of the whole attention.

    Attributes:
        first: the first of them; None: a piece has some of one entry and some of another, so that none has a number.
        count: how many the call has.
        of: how many the whole has.
    """

    first: int | None
    count: int
    of: int

    @property
    def whole(self) -> bool:
        """Whether the call has all there are."""
        return self.count == self.of

    def chosen(self, wanted: tuple[int, ...] | slice | None, name: str, label: str) -> tuple[int, ...] | None:
        """The places in the call of what is wanted, by its numbers in the whole; None: all.

        Raises:
            EditError: one is not there in the whole, or the call's positions have no numbers.
        """
        if wanted is None:
            return None
        if self.first is None:
            raise EditError(
                f"{label}: the model computes some heads of one batch entry together with some of another, so that "
                f"{name}= names none of them; leave it out."
            )
        numbers = chosen(name, wanted, range(self.of), True, label) or ()
        return tuple(i - self.first for i in numbers if 0 <= i - self.first < self.count)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a call is in the attention that it is a piece of; of one that is no piece, all of it.

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
        """Of a call."""
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
        key_heads = Axis(None if heads.first is None else heads.first // per, g, heads.of // per)
        first_row, all_rows = piece.place("T", t) or (0, t)
        return cls(batch, heads, key_heads, Axis(first_row, t, all_rows))
