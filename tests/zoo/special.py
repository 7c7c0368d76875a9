"""Attention whose record needs a word of its own: talking heads, a cache over steps, one softmax over two keys."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import causal, heads
from tests.zoo.base import B, D, E, H, S, T


class TalkingHeads(nn.Module):
    """Heads are mixed by a learned matrix before the softmax, after it, or both."""

    def __init__(self, before: bool, after: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.proj_l = nn.Linear(H, H) if before else None
        self.proj_w = nn.Linear(H, H) if after else None

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * D**-0.5, qkv[1], qkv[2]
        attn = q @ k.transpose(-2, -1)
        if self.proj_l is not None:
            attn = self.proj_l(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        attn = attn.softmax(dim=-1)
        if self.proj_w is not None:
            attn = self.proj_w(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, T, E))

    def softmax_of(self, x: Tensor) -> Tensor:
        """The softmax's own output, by the same operations."""
        q, k, _ = (heads(t, H) for t in self.qkv(x).chunk(3, -1))
        attn = (q * D**-0.5) @ k.transpose(-2, -1)
        if self.proj_l is not None:
            attn = self.proj_l(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return attn.softmax(dim=-1)


class CachedAttention(nn.Module):
    """Keys and values of earlier forwards are kept on the module and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.past: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = (heads(t, H) for t in self.qkv(x).chunk(3, -1))
        if self.past:
            k = torch.cat([self.past[0], k], dim=2)
            v = torch.cat([self.past[1], v], dim=2)
        self.past[:] = [k, v]
        scores = q @ k.transpose(-2, -1) / math.sqrt(D)
        scores = scores.masked_fill(~causal(n, k.shape[2], k.shape[2] - n), float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class BufferCache(nn.Module):
    """The cache is a buffer of full length, written in place and sliced."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.register_buffer("cache_k", torch.zeros(B, length, H, D))
        self.register_buffer("cache_v", torch.zeros(B, length, H, D))

    def forward(self, x: Tensor, start: int) -> Tensor:
        n = x.shape[1]
        q, k, v = self.qkv(x).view(B, n, 3, H, D).unbind(2)
        self.cache_k[:, start : start + n] = k.detach()
        self.cache_v[:, start : start + n] = v.detach()
        keys, values = self.cache_k[:, : start + n], self.cache_v[:, : start + n]
        scores = torch.einsum("bthd,bshd->bhts", q, keys) * D**-0.5
        scores = scores + torch.zeros(n, start + n).masked_fill(~causal(n, start + n, start), -math.inf)
        return self.proj(torch.einsum("bhts,bshd->bthd", scores.softmax(-1), values).flatten(2))


class JointSelfCrossAttention(nn.Module):
    """One softmax over the keys of two sources, split again before the values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.kv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, 2 * E), nn.Linear(E, E)

    def parts(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        q, k1, v1 = (heads(t, H) for t in self.qkv(x).chunk(3, -1))
        k2, v2 = (heads(t, H) for t in self.kv(y).chunk(2, -1))
        return q * D**-0.5, k1, v1, k2, v2

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k1, v1, k2, v2 = self.parts(x, y)
        scores = torch.cat([q @ k1.mT, q @ k2.mT], dim=-1)
        w1, w2 = F.softmax(scores, dim=-1).split([T, S], dim=-1)
        return self.proj((w1 @ v1 + w2 @ v2).transpose(1, 2).flatten(2))
