"""How far away what is attended to is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Out, Statistic
from .block import Block


@dataclass(frozen=True)
class MeanDistance(Statistic):
    """``Σ_j w_j |i − j| / Σ_j w_j`` of a query at key position i, B H T, in keys.

    The divisor is 1 unless there are sinks. 0 for a row with nothing to attend to. Outside of the square around the
    diagonal ``|i − j|`` is linear in j, so that two products with vectors do; counted from that square, so that nothing
    cancels where distances are short and positions large.
    """

    name: ClassVar[str] = "mean_distance"
    positional: ClassVar[bool] = True

    def write(self, block: Block, sums: Tensor | None, out: Out) -> None:
        """See :class:`Statistic`."""
        assert block.positions is not None
        square, (first, last), mass = block.near(0, 0), block.reach, block.mass
        found = torch.linalg.vecdot(mass[..., square], block.distance(square).abs_().to(mass.dtype))
        keys = torch.arange(block.keys.start, block.keys.stop, device=mass.device)
        for columns, origin, sign in ((slice(0, square.start), first, 1), (slice(square.stop, None), last, -1)):
            away = (origin - keys[columns]).mul_(sign).to(mass.dtype)
            if away.numel():
                sums = mass[..., columns] @ torch.stack([away, torch.ones_like(away)], 1)
                rest = (block.positions - origin).mul_(sign).squeeze(-1)
                found = found + sums[..., 0] + sums[..., 1] * rest
        per = torch.where(block.total == 0, 0.0, block.factor / block.total)
        out[self.key][block.place] = found * per.squeeze(-1)
