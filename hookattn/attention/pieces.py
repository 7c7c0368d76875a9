"""Which part of one attention a kernel call is, where a model computes it piece by piece."""

from __future__ import annotations

from typing import NamedTuple


class Cut(NamedTuple):
    """The part of one axis that a process has, where several processes each compute a part of one attention.

    Attributes:
        start: the number of its first position in the whole; None: that is not known.
        of: how many the whole has; None likewise.
    """

    start: int | None
    of: int | None


class Piece(NamedTuple):
    """Query rows ``start`` to ``stop`` of a tensor that was cut along one axis, or along several that lie as one.

    Attributes:
        whole: tells the tensor that was cut from others.
        axes: the letters of what was cut and their extents, the outer first: ``(("T", 7),)`` of query chunks,
            ``(("B", 2), ("H", 4))`` of heads that were folded into the batch.
        start: the first row of the piece.
        stop: one after its last.
    """

    whole: object
    axes: tuple[tuple[str, int], ...]
    start: int
    stop: int

    @property
    def of(self) -> int:
        """How many rows the whole has."""
        n = 1
        for _, extent in self.axes:
            n *= extent
        return n

    @property
    def letters(self) -> str:
        """The letters of what was cut."""
        return "".join(letter for letter, _ in self.axes)

    def place(self, letter: str, extent: int) -> tuple[int, int] | None:
        """Where the positions of one axis of a call are: the first of them, and how many the whole has.

        Args:
            letter: B, H or T.
            extent: of that axis of the call.

        Returns:
            None: the piece has some heads of one batch entry and some of another, so that none has a place.
        """
        rows = self.stop - self.start
        if self.letters == letter and rows == extent:
            return self.start, self.of
        if letter == "H" and self.letters == "BH":
            heads = self.axes[1][1]
            if rows == extent and self.start // heads == (self.stop - 1) // heads:
                return self.start % heads, heads
            return (0, extent) if extent == heads and self.start % heads == rows % heads == 0 else None
        return None if letter == "H" and self.letters == "HB" else (0, extent)
