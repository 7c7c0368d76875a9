"""The attention that stays near the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import checks
from .base import Out, Statistic
from .block import Block


@dataclass(frozen=True)
class LocalMass(Statistic):
    """``Σ_j w_j`` over the keys with ``|i − j| < window``, B H T, where the query is at key position i.

    So ``window`` keys up to and including the query's own, as in a sliding window of that width, and where later keys
    may be attended to ``window − 1`` of them.

    Raises:
        SelectionError: ``window`` is no positive int.
    """

    name: ClassVar[str] = "local_mass"
    positional: ClassVar[bool] = True
    window: int = 16

    def __post_init__(self) -> None:
        window = checks.whole(f"{type(self).__name__}: window", self.window, 1)
        object.__setattr__(self, "window", window)

    @property
    def key(self) -> str:
        """See :class:`Statistic`."""
        return f"{self.name}({self.window})"

    def write(self, block: Block, sums: Tensor, out: Out) -> None:
        """See :class:`Statistic`."""
        near = block.near(self.window - 1, self.window - 1)
        inside = block.distance(near).abs_() < self.window
        out[self.key][block.place] = (block.mass[..., near] * inside).sum(-1) * block.factor.squeeze(-1)
