"""A small causal model in float64, and the same math written out, in which anything can be changed or watched."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

At = Callable[[int, str, Tensor], Tensor]
"""Is given a layer, one of ``q k v weights z``, and its value (B H T …); returns what the model goes on with."""

VOCABULARY, WIDTH, HEADS, LENGTH = 20, 12, 3, 6


class SelfAttention(nn.Module):
    def __init__(self, sharpness: float):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.scale = sharpness / math.sqrt(WIDTH // HEADS)

    def heads(self, x: Tensor, projection: nn.Module) -> Tensor:
        return projection(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(x, p) for p in (self.q, self.k, self.v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.o(z.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, sharpness: float, linear: bool):
        super().__init__()
        self.self_attn, self.mlp, self.linear = SelfAttention(sharpness), nn.Linear(WIDTH, WIDTH), linear

    def after(self, x: Tensor) -> Tensor:
        return x if self.linear else x + torch.tanh(self.mlp(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.self_attn(x))


class Twin(nn.Module):
    """Token ids B T to logits B T V.

    Args:
        layers: how many.
        sharpness: of the softmax.
        linear: whether nothing but attention is in a layer.
    """

    def __init__(self, layers: int = 3, sharpness: float = 1.0, linear: bool = False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH))
            self.layers = nn.ModuleList(Layer(sharpness, linear) for _ in range(layers))
            self.readout = nn.Linear(WIDTH, VOCABULARY)
            for p in self.parameters():
                nn.init.normal_(p, std=0.3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.readout(x)

    def explicit(self, ids: Tensor, at: At = lambda layer, name, x: x) -> Tensor:
        """The same, without any attention kernel."""
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        hidden = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        for i, layer in enumerate(self.layers):
            own: Any = layer.self_attn
            q, k, v = (at(i, n, own.heads(x, getattr(own, n))) for n in "qkv")
            w = at(i, "weights", (own.scale * q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1))
            z = at(i, "z", w @ v)
            x = layer.after(x + own.o(z.transpose(1, 2).flatten(2)))
        return self.readout(x)

    def fields(self, ids: Tensor) -> dict[tuple[int, str], Tensor]:
        """What each layer computes, by layer and name."""
        kept: dict[tuple[int, str], Tensor] = {}

        def keep(layer: int, name: str, x: Tensor) -> Tensor:
            kept[layer, name] = x.detach()
            return x

        self.explicit(ids, keep)
        return kept


def gradients(model: Twin, ids: Tensor, metric: Callable[[Tensor], Tensor]) -> dict[tuple[int, str], Tensor]:
    """The gradient of a metric of everything that the written-out math computes, by autograd."""
    leaves: dict[tuple[int, str], Tensor] = {}

    def watched(layer: int, name: str, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.requires_grad_()
        x.retain_grad()
        leaves[layer, name] = x
        return x

    metric(model.explicit(ids, watched)).backward()
    found = {key: torch.zeros_like(x) if x.grad is None else x.grad.detach() for key, x in leaves.items()}
    model.zero_grad()
    return found


def ids(seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


def logits_metric(y: Tensor) -> Tensor:
    """Linear in the logits, of all positions."""
    wanted = torch.linspace(-1, 1, y.shape[-1] * y.shape[1], dtype=y.dtype).view(y.shape[1], y.shape[2])
    return (y * wanted).sum((1, 2)).mean()


def curved_metric(y: Tensor) -> Tensor:
    return y[:, -1].log_softmax(-1)[:, 4].mean() + torch.sin(y[:, 2, 3]).mean()
