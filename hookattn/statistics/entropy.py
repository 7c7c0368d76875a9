"""How spread out a query's attention is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Out, Statistic
from .block import Block


@dataclass(frozen=True)
class Entropy(Statistic):
    """``−Σ_j w_j ln w_j`` in nats, B H T; the weight that sinks take has no part in the sum.

    As ``−Σ_j w_j (s_j − lse)``, which needs no logarithm of a weight. 0 for a row with nothing to attend to.
    """

    name: ClassVar[str] = "entropy"
    last: ClassVar[bool] = True

    def write(self, block: Block, sums: Tensor, out: Out) -> None:
        """See :class:`Statistic`."""
        product = block.shifted.mul_(block.mass).sum(-1, keepdim=True) * block.factor
        rest = torch.where(block.total == 0, 0.0, (block.lse - block.top) * block.total)
        out[self.key][block.place] = (rest - product).clamp_min_(0).squeeze(-1)
