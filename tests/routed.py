"""A model whose forward cannot be planned."""

from __future__ import annotations

from torch import Tensor, nn


class Routed(nn.Module):
    """Decides by values where to go, so that nobody can plan it."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """B T C -> B T C."""
        y: Tensor = self.mha(x, x, x)[0]
        return y if bool(y.sum() > 0) else -y
