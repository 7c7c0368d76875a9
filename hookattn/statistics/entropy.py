"""How spread out a query's attention is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Out, Statistic
from .block import LOG2E, Block


@dataclass(frozen=True)
class Entropy(Statistic):
    """``−Σ_j w_j ln w_j`` in nats, B H T; the weight that sinks take has no part in the sum.

    With ``w_j = 2^x_j · f`` it is ``−ln 2 · Σ_j w_j x_j − ln f · Σ_j w_j``: no weight needs a logarithm, and a
    weight of 0 is no case of its own. 0 for a row with nothing to attend to.
    """

    name: ClassVar[str] = "entropy"
    last: ClassVar[bool] = True

    def write(self, block: Block, sums: Tensor, out: Out) -> None:
        """See :class:`Statistic`."""
        product = block.shifted.mul_(block.mass).sum(-1, keepdim=True).mul_(block.factor / -LOG2E)
        out[self.key][block.place] = product.sub_(torch.xlogy(block.total, block.factor)).clamp_min_(0).squeeze(-1)
