"""The keys that get most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks
from .base import Out, Statistic
from .block import HIDDEN, Block


@dataclass(frozen=True)
class TopK(Statistic):
    """The ``k`` keys with the largest weights, largest first: their weights, and their positions.

    Two fields: ``top_k(k)``, the weights, and ``top_k_keys(k)``, int64, both B H T k. Where a query may attend to fewer
    keys, the rest are position −1 with weight 0. Which of several equal weights come first is not defined.

    Raises:
        SelectionError: ``k`` is no positive int.
    """

    name: ClassVar[str] = "top_k"
    axes: ClassVar[str] = "BHT*"
    integers: ClassVar[frozenset[str]] = frozenset({"top_k_keys"})
    k: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", checks.whole("TopK: k", self.k, 1))

    @property
    def key(self) -> str:
        """See :class:`Statistic`."""
        return f"{self.name}({self.k})"

    @property
    def fields(self) -> tuple[str, ...]:
        """The weights and the keys."""
        return (self.key, f"{self.name}_keys({self.k})")

    def allocate(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Out:
        """See :class:`Statistic`."""
        weights, keys = self.fields
        size = (*shape[:3], self.k)
        return {
            weights: torch.zeros(size, dtype=dtype, device=device),
            keys: torch.full(size, -1, dtype=torch.int64, device=device),
        }

    def write(self, block: Block, sums: Tensor, out: Out) -> None:
        """See :class:`Statistic`."""
        n = min(self.k, block.mass.shape[-1])
        values, index = torch.topk(block.shifted, n, -1)
        weights, keys = self.fields
        out[weights][(*block.place, slice(0, n))] = values.exp2() * block.factor
        index = torch.where(values > HIDDEN / 2, index + block.keys.start, -1)
        out[keys][(*block.place, slice(0, n))] = index
