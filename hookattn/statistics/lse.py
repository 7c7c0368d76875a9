"""The logarithm of the softmax's denominator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Out, Statistic
from .block import Block


@dataclass(frozen=True)
class LogSumExp(Statistic):
    """``ln(Σ_j exp s_j + Σ exp sinks)`` over the keys that may be attended to, B H T.

    −∞ for a row with nothing to attend to and no sink. Any weight is ``exp(s − lse)``, as fused kernels keep it for
    their backward pass (Dao 2023, FlashAttention-2).
    """

    name: ClassVar[str] = "lse"
    of_scores: ClassVar[bool] = True

    def allocate(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Out:
        """See :class:`Statistic`."""
        return {self.key: torch.full(shape[:3], -torch.inf, dtype=dtype, device=device)}

    def write(self, block: Block, sums: Tensor, out: Out) -> None:
        """See :class:`Statistic`."""
        out[self.key][block.place] = block.lse.squeeze(-1)
