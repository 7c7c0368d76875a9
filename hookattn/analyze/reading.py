"""What a measure gives for one call: a number for each head in every batch entry, and what it is the mean of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Reading:
    """A measure of one call.

    Attributes:
        value: B H, float64; NaN where it is not defined (no row that counts).
        count: B, or B H: how many rows each value is the mean of; batches are averaged by it.
        rows: B H T, the value of each query row, NaN for one that does not count; None where it is no mean of these.
    """

    value: Tensor
    count: Tensor
    rows: Tensor | None = None

    @classmethod
    def joined(cls, blocks: Sequence[Reading]) -> Reading:
        """That of all heads, of those of some heads each, in their order."""
        first = blocks[0]
        rows = [block.rows for block in blocks if block.rows is not None]
        return cls(
            torch.cat([block.value for block in blocks], 1),
            first.count if first.count.dim() == 1 else torch.cat([block.count for block in blocks], 1),
            torch.cat(rows, 1) if len(rows) == len(blocks) else None,
        )

    @property
    def heads(self) -> Tensor:
        """H: the mean over the batch, each entry by its count; NaN where no row counts."""
        count = (self.count if self.count.dim() == 2 else self.count.unsqueeze(1)).expand(self.value.shape)
        # NaN with a count is a value that is not finite, and is to be seen; NaN without one is an entry with no row.
        count = torch.where(self.value.isnan() & (count == 0), 0, count)
        return torch.where(count > 0, self.value * count, 0.0).sum(0) / count.sum(0)
