"""The largest score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Out, Statistic
from .block import Block


@dataclass(frozen=True)
class MaxScore(Statistic):
    """``max_j s_j`` over the keys that may be attended to, sinks left out, B H T; −∞ where there are none.

    Its growth is the usual sign of a training run about to diverge (Dehghani et al. 2023, ViT-22B).
    """

    name: ClassVar[str] = "max_score"
    of_scores: ClassVar[bool] = True

    def allocate(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Out:
        """See :class:`Statistic`."""
        return {self.key: torch.full(shape[:3], -torch.inf, dtype=dtype, device=device)}

    def write(self, block: Block, sums: Tensor, out: Out) -> None:
        """See :class:`Statistic`."""
        out[self.key][block.place] = block.top.squeeze(-1)
