"""A block: some rows of some heads, after the exponential."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# What a masked score is replaced by: no score is near it, its exponential is 0, and 0 times it is no NaN as for −∞.
HIDDEN = -1e30
# exp s = 2 to the power of s·log₂e. torch computes powers of 2 by its own vector code, and leaves those of e to a math
# library that is 4 times slower on some processors, and 30 times where scores are masked.
LOG2E = 1 / math.log(2)


@dataclass(slots=True)
class Block:
    """R query rows of b batch entries and h heads, against the n keys that any of them may attend to.

    Attributes:
        place: which batch entries, heads and rows of the result these are.
        keys: which keys.
        shifted: b h R n, (scores − the row's largest)·log₂e; far below 0 where masked.
        mass: b h R n, 2 to the power of ``shifted``; ``mass · factor`` are the weights.
        factor: b h R 1, 0 for a row with nothing to attend to.
        top: b h R 1, the largest score under the mask; −∞ for such a row.
        lse: b h R 1, the logarithm of the softmax's denominator, sinks included; −∞ for such a row without sinks.
        total: b h R 1, the sum of the weights: 1 without sinks, 0 for such a row.
        positions: (b or 1) 1 R 1, the key position that each query is at; None where there is no such thing.
        reach: the least and the greatest of ``positions``.
    """

    place: tuple[slice, slice, slice]
    keys: slice
    shifted: Tensor
    mass: Tensor
    factor: Tensor
    top: Tensor
    lse: Tensor
    total: Tensor
    positions: Tensor | None
    reach: tuple[int, int]

    def near(self, before: int, after: int) -> slice:
        """The columns of ``mass`` from ``before`` keys before the first query to ``after`` keys after the last one."""
        n = self.mass.shape[-1]
        first, last = self.reach
        start = min(max(first - before - self.keys.start, 0), n)
        return slice(start, min(max(last + after + 1 - self.keys.start, start), n))

    def distance(self, columns: slice) -> Tensor:
        """(b or 1) 1 R m: query position − key position, for some columns of ``mass``."""
        assert self.positions is not None
        start = self.keys.start
        device = self.positions.device
        return self.positions - torch.arange(start + columns.start, start + columns.stop, device=device)
