"""Which part of one attention a kernel call is, where a model computes it piece by piece."""

from __future__ import annotations

from typing import NamedTuple


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
