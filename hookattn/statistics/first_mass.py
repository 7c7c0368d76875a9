"""The attention that goes to the first keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import checks
from .base import Out, Statistic
from .block import Block


@dataclass(frozen=True)
class FirstMass(Statistic):
    """``Σ_{j < n} w_j``, B H T: what attention sinks among the tokens take (Xiao et al. 2023, StreamingLLM).

    The first keys of the tensor, whatever they are: with padding on the left they are padding, and weigh 0.

    Raises:
        SelectionError: ``n`` is no positive int.
    """

    name: ClassVar[str] = "first_mass"
    n: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", checks.whole("FirstMass: n", self.n, 1))

    @property
    def key(self) -> str:
        """See :class:`Statistic`."""
        return f"{self.name}({self.n})"

    def write(self, block: Block, sums: Tensor, out: Out) -> None:
        """See :class:`Statistic`."""
        first = block.mass[..., : max(self.n - block.keys.start, 0)]
        out[self.key][block.place] = first.sum(-1) * block.factor.squeeze(-1)
