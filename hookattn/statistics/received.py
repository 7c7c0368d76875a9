"""The attention that a key gets from all queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Out, Statistic
from .block import Block


@dataclass(frozen=True)
class Received(Statistic):
    """``Σ_i w_ij`` over the queries that are kept, B H S: a column sum of the weights.

    High for heavy hitters (Zhang et al. 2023, H2O). Padded queries count like any others.
    """

    name: ClassVar[str] = "received"
    axes: ClassVar[str] = "BHS"

    def allocate(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Out:
        """See :class:`Statistic`."""
        b, h, _, s = shape
        return {self.key: torch.zeros(b, h, s, dtype=dtype, device=device)}

    def write(self, block: Block, sums: Tensor, out: Out) -> None:
        """See :class:`Statistic`."""
        column = block.factor.squeeze(-1).unsqueeze(-2) @ block.mass
        out[self.key][(*block.place[:2], block.keys)] += column.squeeze(-2)
