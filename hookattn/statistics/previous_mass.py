"""The attention that goes to the token before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Out, Statistic
from .block import Block
from .offset_mass import mass_at_offset


@dataclass(frozen=True)
class PreviousMass(Statistic):
    """``w_{i−1}`` of a query at key position i, B H T; 0 at position 0. High in previous-token heads.

    See Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """

    name: ClassVar[str] = "previous_mass"
    positional: ClassVar[bool] = True

    def write(self, block: Block, sums: Tensor, out: Out) -> None:
        """See :class:`Statistic`."""
        out[self.key][block.place] = mass_at_offset(block, -1)
