"""Models whose attention is written out by hand, as researchers write it, for tests that trace them again and again."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.reference import draw, heads, merge

B, E, H, D = 2, 16, 4, 4


class Attention(nn.Module):
    """An attention with the options in which the layers of a model differ."""

    def __init__(
        self,
        *,
        window: int | None = None,
        p: float = 0.0,
        scale: float = D**-0.5,
        rotary: bool = False,
        groups: int = H,
    ) -> None:
        super().__init__()
        self.window, self.p, self.scale, self.rotary, self.groups = window, p, scale, rotary, groups
        self.q, self.kv, self.out = nn.Linear(E, E), nn.Linear(E, 2 * groups * D), nn.Linear(E, E)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        y = x if memory is None else memory
        q = heads(self.q(x), H)
        k, v = (heads(one, self.groups) for one in self.kv(y).chunk(2, -1))
        if self.groups < H:
            k, v = (one.repeat_interleave(H // self.groups, 1) for one in (k, v))
        if self.rotary:
            q, k = rotated(q), rotated(k)
        scores = q @ k.transpose(-2, -1) * self.scale
        if memory is None:
            scores = scores.masked_fill(~self.visible(x.shape[1]), -math.inf)
        weights = F.dropout(scores.softmax(-1), self.p, self.training)
        return self.out(merge(weights @ v))

    def visible(self, n: int) -> Tensor:
        ones = torch.ones(n, n, dtype=torch.bool).tril()
        return ones if self.window is None else ones.triu(1 - self.window)


def rotated(x: Tensor) -> Tensor:
    t = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / 10 ** torch.arange(0, D, 2, dtype=x.dtype)
    cos, sin = t.cos().repeat(1, 2), t.sin().repeat(1, 2)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Layer(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(E), Attention(**options)
        self.mlp = nn.Sequential(nn.LayerNorm(E), nn.Linear(E, 2 * E), nn.GELU(), nn.Linear(2 * E, E))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Model(nn.Module):
    """Layers one after another."""

    def __init__(self, *options: dict[str, Any], recompute: bool | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(**one) for one in options])
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.recompute is None else checkpoint(layer, x, use_reentrant=self.recompute)
        return x


plain = partial(Model, {}, {}, {}, {})


class InOneModule(nn.Module):
    """A loop over layers in one module, of stacked parameters."""

    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.W_Q, self.W_K, self.W_V, self.W_O = (nn.Parameter(draw(n, E, E, seed=i, std=0.3)) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.W_Q)):
            q, k, v = (heads(x @ w[i], H) for w in (self.W_Q, self.W_K, self.W_V))
            x = x + merge((q @ k.mT / math.sqrt(D)).softmax(-1) @ v) @ self.W_O[i]
        return x


class RawParameters(nn.Module):
    """``x @ self.W`` by head, with einsum, and tied: keys are made of what makes queries in the layer below."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.ParameterList([draw(H, E, D, seed=i, std=0.4) for i in range(5)])
        self.W_O = nn.Parameter(draw(H, D, E, seed=9, std=0.3))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(4):
            q, k, v = (torch.einsum("bte,hed->bhtd", x, self.W[j]) for j in (i, i + 1, 4 - i))
            weights = torch.einsum("bhtd,bhsd->bhts", q, k).div(D**0.5).softmax(dim=-1)
            x = x + torch.einsum("bhtd,hde->bte", torch.einsum("bhts,bhsd->bhtd", weights, v), self.W_O)
        return x


class SelfAndCross(nn.Module):
    """Two attentions in one module, with weights that are read and used again."""

    def __init__(self) -> None:
        super().__init__()
        self.mine, self.other, self.out = nn.Linear(E, 3 * E), nn.Linear(E, 2 * E), nn.Linear(2 * E, E)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (heads(one, H) for one in self.mine(x).chunk(3, -1))
        here = ((q @ k.mT) * D**-0.5).softmax(-1) @ v
        k, v = (heads(one, H) for one in self.other(y).chunk(2, -1))
        there = ((q @ k.mT) * D**-0.5).softmax(-1) @ v
        return self.out(torch.cat([merge(here), merge(there)], -1))


class Differential(nn.Module):
    """The difference of two softmaxes meets the values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(E, n) for n in (2 * E, 2 * E, E, E))
        self.lam = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        q1, q2 = (heads(one, H) for one in self.q(x).chunk(2, -1))
        k1, k2 = (heads(one, H) for one in self.k(x).chunk(2, -1))
        v = heads(self.v(x), H)
        one, two = ((q @ k.mT / 2).softmax(-1) for q, k in ((q1, k1), (q2, k2)))
        return x + self.out(merge((one - self.lam * two) @ v))


class TwoOutputs(Differential):
    """As an author would who knows that v can be multiplied twice."""

    def forward(self, x: Tensor) -> Tensor:
        q1, q2 = (heads(one, H) for one in self.q(x).chunk(2, -1))
        k1, k2 = (heads(one, H) for one in self.k(x).chunk(2, -1))
        v = heads(self.v(x), H)
        one, two = ((q @ k.mT / 2).softmax(-1) @ v for q, k in ((q1, k1), (q2, k2)))
        return x + self.out(merge(one - self.lam * two))


class Chunked(nn.Module):
    """Queries in chunks, the last of them smaller."""

    def __init__(self, size: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.size, self.qkv = size, nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.qkv:
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            parts = []
            for start in range(0, x.shape[1], self.size):
                scores = q[:, :, start : start + self.size] @ k.mT / math.sqrt(D)
                parts.append(scores.softmax(-1) @ v)
            x = x + merge(torch.cat(parts, 2))
        return x


class Loops(Chunked):
    """A head at a time, as three loops in one."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.qkv:
            q, k, v = layer(x).chunk(3, -1)
            outs = []
            for h in range(H):
                part = slice(h * D, (h + 1) * D)
                weights = torch.softmax(q[..., part].matmul(k[..., part].transpose(1, 2)) / 2, dim=-1)
                outs.append(weights.matmul(v[..., part]))
            x = x + torch.cat(outs, dim=-1)
        return x


class HeadModules(nn.Module):
    """Karpathy's first: a module for each head."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.query, self.value = (nn.Linear(E, D, bias=False) for _ in range(3))
            self.register_buffer("tril", torch.tril(torch.ones(8, 8)))

        def forward(self, x: Tensor) -> Tensor:
            t = x.shape[1]
            k, q = self.key(x), self.query(x)
            wei = q @ k.transpose(-2, -1) * D**-0.5
            wei = wei.masked_fill(self.tril[:t, :t] == 0, float("-inf"))
            return F.softmax(wei, dim=-1) @ self.value(x)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleList([self.Head() for _ in range(H)]) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.cat([head(x) for head in block], dim=-1)
        return x


class SharedKeys(nn.Module):
    """Keys and values of the first layer, read by all."""

    def __init__(self) -> None:
        super().__init__()
        self.kv, self.q = nn.Linear(E, 2 * E), nn.ModuleList([nn.Linear(E, E) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        k, v = (heads(one, H) for one in self.kv(x).chunk(2, -1))
        for q in self.q:
            x = x + merge((heads(q(x), H) @ k.mT / 2).softmax(-1) @ v)
        return x


class WeightsAgain(nn.Module):
    """Weights come back with the output, and meet other values after all layers: a rollout, and a copy head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(3)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first, found = x, []
        for layer in self.layers:
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            weights = (q @ k.mT / 2).softmax(-1)
            x = x + merge(weights @ v)
            found.append(weights)
        copied = found[-1].mean(1) @ first
        return x, copied, *found


class Tied(nn.Module):
    """One layer, run several times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(rotary=True)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.layer(x)
        return x


class Between(nn.Module):
    """Fused attention between attention that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            out = F.scaled_dot_product_attention(q, k, v) if i % 2 else (q @ k.mT / 2).softmax(-1) @ v
            x = x + merge(out)
        return x


class Steps(nn.Module):
    """A softmax in steps, in float32, with a cap."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            scores = torch.tanh(q @ k.mT / 2 / 5.0) * 5.0
            mass = (scores - scores.amax(-1, keepdim=True)).exp()
            x = x + merge((mass @ v) / mass.sum(-1, keepdim=True))
        return x


class Cached(nn.Module):
    """Layers with a cache of keys and values, as they are generated with."""

    def __init__(self, n: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(n)])

    def forward(self, x: Tensor, past: list[tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, Any]:
        now = []
        for i, layer in enumerate(self.layers):
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            if past is not None:
                k, v = torch.cat([past[i][0], k], 2), torch.cat([past[i][1], v], 2)
            now.append((k, v))
            t, s = q.shape[2], k.shape[2]
            hidden = torch.ones(t, s).triu(s - t + 1).bool()
            x = x + merge((q @ k.mT / 2).masked_fill(hidden, -math.inf).softmax(-1) @ v)
        return x, now


class Static(Cached):
    """As :class:`Cached`, in buffers that are written to."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(2):
            self.register_buffer(f"k{i}", torch.zeros(B, H, 12, D))
            self.register_buffer(f"v{i}", torch.zeros(B, H, 12, D))

    def cache(self, i: int) -> tuple[Tensor, Tensor]:
        return getattr(self, f"k{i}"), getattr(self, f"v{i}")

    def forward(self, x: Tensor, at: int = 0) -> Tensor:  # type: ignore[override]
        t = x.shape[1]
        for i, layer in enumerate(self.layers):
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            keys, values = self.cache(i)
            keys[:, :, at : at + t] = k
            values[:, :, at : at + t] = v
            seen = torch.arange(12)[None, :] <= torch.arange(at, at + t)[:, None]
            scores = (q @ keys.mT / 2).masked_fill(~seen, torch.finfo(q.dtype).min)
            x = x + merge(scores.softmax(-1) @ values)
        return x


class OneBuffer(Static):
    """All layers have their cache in one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("both", torch.zeros(2, 2, B, H, 12, D))

    def cache(self, i: int) -> tuple[Tensor, Tensor]:
        return self.both[0, i], self.both[1, i]


class Dropped(Model):
    """Layers are dropped at random, and the last are left out where the input is small."""

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if torch.rand(()) < 0.4:
                continue
            x = layer(x)
            if i > 1 and bool(x.abs().mean() < 0.5):
                break
        return x


class Routed(nn.Module):
    """Only some tokens attend, told by their values; then as many as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.layers = nn.Linear(E, 1), nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            chosen = self.gate(x[0]).squeeze(-1) > 0
            part = x[0][chosen]
            q, k, v = (one.unflatten(-1, (H, D)).transpose(0, 1) for one in layer(part).chunk(3, -1))
            out = ((q @ k.mT / 2).softmax(-1) @ v).transpose(0, 1).flatten(1)
            y = x[0].clone()
            y[chosen] = y[chosen] + out
            x = y[None]
        return x


class Sorted(nn.Module):
    """A list of examples of other lengths, an attention for each."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)

    def forward(self, *xs: Tensor) -> list[Tensor]:
        outs = []
        for x in sorted(xs, key=len):
            q, k, v = (one.view(-1, H, D).transpose(0, 1) for one in self.qkv(x).chunk(3, -1))
            outs.append(((q @ k.mT / 2).softmax(-1) @ v).transpose(0, 1).reshape(-1, E))
        return outs


class Batched(nn.Module):
    """``vmap`` over heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT / 2).softmax(-1) @ v

        for layer in self.qkv:
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            x = x + merge(torch.vmap(attend, 1, 1)(q, k, v))
        return x


class Pass(nn.Module):
    """Stands where somebody may hook."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Modular(nn.Module):
    """An attention whose every step is a module that may be hooked or exchanged."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.heads = H
        self.q, self.k, self.v, self.out = (nn.Linear(E, E) for _ in range(4))
        self.scores, self.softmax, self.dropout, self.merged = Pass(), nn.Softmax(-1), nn.Dropout(p), Pass()
        self.hides = True

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(one(x), self.heads) for one in (self.q, self.k, self.v))
        scores = self.scores(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))
        if self.hides:
            t = x.shape[1]
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -math.inf)
        weights = self.dropout(self.softmax(scores))
        return self.out(self.merged(merge(weights @ v)))


class ModularNet(nn.Module):
    """Three modular ones."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Modular(p) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x
