"""The attention that goes to keys far away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Out
from .block import Block
from .local_mass import LocalMass


@dataclass(frozen=True)
class FarMass(LocalMass):
    """``Σ_j w_j`` over the keys with ``|i − j| ≥ window``, B H T: what :class:`LocalMass` leaves.

    Raises:
        SelectionError: ``window`` is no positive int.
    """

    name: ClassVar[str] = "far_mass"

    def write(self, block: Block, sums: Tensor, out: Out) -> None:
        """See :class:`Statistic`."""
        super().write(block, sums, out)
        near = out[self.key][block.place]
        out[self.key][block.place] = (block.total.squeeze(-1) - near).clamp_min_(0)
