"""A small causal model in which everything goes on while it trains that a measurement must not touch, and what its
heads do, in explicit float64."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, HEADS, LAYERS = 30, 16, 4, 2


class Layer(nn.Module):
    """Causal attention by the fused kernel, with dropout in it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.batch_norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0)
        y = self.out(y.transpose(1, 2).flatten(2))
        return x + F.dropout(self.batch_norm(y.transpose(1, 2)).transpose(1, 2), 0.1, self.training)


class Small(nn.Module):
    """Random numbers of torch and Python, statistics of batches, a counter, a part that stays in evaluation mode, and a
    ``train()`` of its own.

    Args:
        checkpointed: whether layers run again in the backward.
    """

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCABULARY, WIDTH)
            self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
            self.frozen = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))
            self.head = nn.Linear(WIDTH, VOCABULARY)
            for layer in self.layers:
                layer.qkv.weight.data *= 4
        self.register_buffer("runs", torch.zeros((), dtype=torch.long))
        self.switched: list[bool] = []
        self.checkpointed = checkpointed
        self.train()

    def train(self, mode: bool = True) -> Small:
        super().train(mode)
        self.switched.append(mode)
        self.frozen.eval()
        return self

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        self.runs += 1  # counts every forward, in evaluation mode too
        noise = torch.rand(()) * 0.01 + random.random() * 0.01
        x = self.embed(input_ids)
        for layer in self.layers:
            again = self.checkpointed and self.training
            x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        logits = self.head(x + self.frozen(x)) + (noise if self.training else 0)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


def data(count: int = 64, length: int = 12) -> Tensor:
    """Token ids."""
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(5))


def train(model: nn.Module, steps: int, each: Any = None, autocast: bool = False, accumulated: int = 1) -> list[Any]:
    """The losses, and then all the model and the optimizer have come to, and the random numbers that are next."""
    torch.manual_seed(1)
    random.seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows, losses = data(), []
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = torch.zeros(())
            for part in range(accumulated):
                ids = rows[(step * accumulated + part) * 4 % 60 :][:4]
                total = total + model(ids, labels=ids)["loss"]
                if each is not None:
                    each(model, step)  # in the midst of a step: gradients are there, and weights that autocast has cast
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    state = [x.clone() for x in (*model.state_dict().values(),)]
    moments = [x.clone() for own in optimizer.state.values() for x in own.values()]
    return [losses, state, moments, torch.rand(3), random.random()]


def equal(a: Any, b: Any) -> bool:
    """To the last bit."""
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(torch.equal(a, b)) if isinstance(a, Tensor) else a == b


def explicit(model: Small, prompts: Tensor) -> dict[str, Tensor]:
    """Each measure, L H, in float64 from the weights alone: no kernel, no hook, no function of the package."""
    state = {name: value.detach().double() for name, value in model.state_dict().items()}
    made: dict[str, list[Tensor]] = {"entropy": [], "induction": [], "first_token": [], "sink": []}
    x = state["embed.weight"][prompts]
    for n in range(LAYERS):
        own = {name.removeprefix(f"layers.{n}."): v for name, v in state.items() if name.startswith(f"layers.{n}.")}
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        y = (x - mean) / (variance + 1e-5).sqrt() * own["norm.weight"] + own["norm.bias"]
        b, t, _ = x.shape
        q, k, v = (y @ own["qkv.weight"].T + own["qkv.bias"]).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        made["entropy"].append(-(weights * weights.clamp_min(1e-300).log()).sum(-1).mean((0, 2)))
        alpha = weights[..., 0].mean(-1)  # B H
        made["first_token"].append(alpha.mean(0))
        made["sink"].append((alpha > 0.3).double().mean(0))
        by_prompt = [_induction(w, row.tolist()) for w, row in zip(weights, prompts, strict=True)]
        made["induction"].append(torch.stack(by_prompt).mean(0))
        y = (weights @ v).transpose(1, 2).flatten(2) @ own["out.weight"].T + own["out.bias"]
        y = (y - own["batch_norm.running_mean"]) / (own["batch_norm.running_var"] + 1e-5).sqrt()
        x = x + y * own["batch_norm.weight"] + own["batch_norm.bias"]
    return {name: torch.stack(values) for name, values in made.items()}


def _induction(weights: Tensor, ids: list[int]) -> Tensor:
    """H: of weights H T T, the mean over the queries whose token was there before, of what goes behind these."""
    found = []
    for i, token in enumerate(ids):
        keys = [j + 1 for j in range(i) if ids[j] == token]
        if keys:
            found.append(weights[:, i, keys].sum(-1))
    return torch.stack(found).mean(0)
