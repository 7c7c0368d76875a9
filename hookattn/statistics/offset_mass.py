"""The attention that goes to the token a fixed number of places away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import checks
from .base import Out, Statistic
from .block import Block


def mass_at_offset(block: Block, offset: int) -> Tensor:
    """b h R: the weight that each query of a block gives to the key ``offset`` places after it."""
    assert block.positions is not None
    n = block.mass.shape[-1]
    # Gathered at a key that is there in any case, and set to 0 after it where the right one is none of the block's.
    at = block.positions + (offset - block.keys.start)
    found = block.mass.gather(-1, at.clamp(0, n - 1).expand(*block.mass.shape[:3], 1))
    return (found * block.factor).mul_((at >= 0) & (at < n)).squeeze(-1)


@dataclass(frozen=True)
class OffsetMass(Statistic):
    """``w_{i+offset}`` of a query at key position i, B H T; 0 where there is no such key. 0 is the token itself.

    Raises:
        SelectionError: ``offset`` is no int.
    """

    name: ClassVar[str] = "offset_mass"
    positional: ClassVar[bool] = True
    offset: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "offset", checks.whole("OffsetMass: offset", self.offset))

    @property
    def key(self) -> str:
        """See :class:`Statistic`."""
        return f"{self.name}({self.offset})"

    def write(self, block: Block, sums: Tensor, out: Out) -> None:
        """See :class:`Statistic`."""
        out[self.key][block.place] = mass_at_offset(block, self.offset)
