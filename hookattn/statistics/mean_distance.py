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

    The divisor is 1 unless there are sinks. 0 for a row with nothing to attend to.

    For a key j before or after all queries of a block, ``|i − j|`` is ``|first − j| ± (i − first)``, where the first
    query is at ``first``: products with two vectors give the sum, one of distances and one of signs. Only for keys
    in between, a square around the diagonal, each pair is looked at. Distances are counted from ``first`` and not
    from 0, so that nothing cancels where they are short and positions large.
    """

    name: ClassVar[str] = "mean_distance"
    positional: ClassVar[bool] = True

    def columns(self) -> int:
        """Two."""
        return 2

    def fill(self, columns: Tensor, keys: slice, reach: tuple[int, int] | None) -> None:
        """How far keys are from the first query, and on which side; 0 in the square."""
        if reach is None:
            return
        first, last = reach  # key positions of the block's queries
        away, side = columns
        torch.arange(first - keys.start, first - keys.stop, -1, out=away)
        torch.sign(away, out=side)
        away.abs_()
        columns[:, max(first - keys.start, 0) : max(last + 1 - keys.start, 0)] = 0

    def write(self, block: Block, sums: Tensor, out: Out) -> None:
        """See :class:`Statistic`."""
        assert block.positions is not None
        square = block.near(0, 0)
        within = (block.mass[..., square] * block.distance(square).abs_()).sum(-1)
        beyond = (block.positions - block.reach[0]).squeeze(-1)
        found = within + sums[..., 0] + sums[..., 1] * beyond
        per = torch.where(block.total == 0, 0.0, block.factor / block.total)
        out[self.key][block.place] = found * per.squeeze(-1)
