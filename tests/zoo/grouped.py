"""Grouped and multi-query heads in every spelling, with the two rotary styles. k and v are never repeated."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from tests.reference import causal, heads
from tests.zoo.base import B, D, E, Entry, Expected, T, zoo

HEADS, GROUPS = 4, 2
R = HEADS // GROUPS


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def rope_half(x: Tensor) -> Tensor:
    """B H T D, the two halves rotated against each other."""
    freq = 1.0 / (100.0 ** (torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
    angle = torch.outer(torch.arange(x.shape[-2]).float(), freq)
    cos, sin = torch.cat((angle, angle), -1).cos().to(x.dtype), torch.cat((angle, angle), -1).sin().to(x.dtype)
    return (x * cos) + (rotate_half(x) * sin)


def rope_complex(x: Tensor) -> Tensor:
    """B T H D, neighbours as complex numbers."""
    freq = 1.0 / (100.0 ** (torch.arange(0, x.shape[-1], 2) / x.shape[-1]))
    angle = torch.outer(torch.arange(x.shape[1]).float(), freq)
    turn = torch.polar(torch.ones_like(angle), angle)
    if x.dtype == torch.float64:
        turn = turn.to(torch.complex128)
    pairs = torch.view_as_complex((x.double() if x.dtype == torch.float64 else x.float()).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn[None, :, None, :]).flatten(3).type_as(x)


class Grouped(Entry):
    """q has HEADS heads, k and v have GROUPS; subclasses write the attention."""

    out = "wo"
    groups = GROUPS

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wo = nn.Linear(E, E, bias=False), nn.Linear(E, E, bias=False)
        self.wk = nn.Linear(E, self.groups * D, bias=False)
        self.wv = nn.Linear(E, self.groups * D, bias=False)

    def expected(self, x: Tensor) -> Expected:
        q, k, v = heads(self.wq(x), HEADS), heads(self.wk(x), self.groups), heads(self.wv(x), self.groups)
        return Expected(q, k, v, scale=D**-0.5)


def repeat_kv(hidden_states: Tensor, n_rep: int) -> Tensor:
    batch, num_key_value_heads, slen, head_dim = hidden_states.shape
    if n_rep == 1:
        return hidden_states
    hidden_states = hidden_states[:, :, None, :, :].expand(batch, num_key_value_heads, n_rep, slen, head_dim)
    return hidden_states.reshape(batch, num_key_value_heads * n_rep, slen, head_dim)


@zoo("gqa_llama_rope_half_repeat_kv", tol=1e-5)
class LlamaAttention(Grouped):
    def forward(self, x: Tensor) -> Tensor:
        query = rope_half(self.wq(x).view(B, T, HEADS, D).transpose(1, 2))
        key = rope_half(self.wk(x).view(B, T, GROUPS, D).transpose(1, 2))
        value = self.wv(x).view(B, T, GROUPS, D).transpose(1, 2)
        key, value = repeat_kv(key, R), repeat_kv(value, R)
        w = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(D)
        w = w + torch.full((1, 1, T, T), torch.finfo(w.dtype).min, dtype=w.dtype).triu(diagonal=1)
        w = nn.functional.softmax(w, dim=-1, dtype=torch.float32).to(query.dtype)
        return self.wo(torch.matmul(w, value).transpose(1, 2).contiguous().reshape(B, T, E))

    def expected(self, x: Tensor) -> Expected:
        e = super().expected(x)
        e.q, e.k, e.mask = rope_half(e.q), rope_half(e.k), causal(T)
        return e


@zoo("gqa_meta_rope_complex_expand", tol=1e-5)
class MetaAttention(Grouped):
    """The first LLaMA code: complex rotary on B T H D, repeat_kv before the transpose."""

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, _ = x.shape
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq, xk = rope_complex(xq.view(bsz, seqlen, HEADS, D)), rope_complex(xk.view(bsz, seqlen, GROUPS, D))
        xv = xv.view(bsz, seqlen, GROUPS, D)
        keys = xk[:, :, :, None, :].expand(bsz, seqlen, GROUPS, R, D).reshape(bsz, seqlen, HEADS, D)
        values = xv[:, :, :, None, :].expand(bsz, seqlen, GROUPS, R, D).reshape(bsz, seqlen, HEADS, D)
        xq, keys, values = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(D)
        scores = scores + torch.triu(torch.full((seqlen, seqlen), float("-inf")), diagonal=1).type_as(x)
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        output = torch.matmul(scores, values)
        return self.wo(output.transpose(1, 2).contiguous().view(bsz, seqlen, -1))

    def expected(self, x: Tensor) -> Expected:
        e = super().expected(x)
        e.q = rope_complex(self.wq(x).view(B, T, HEADS, D)).transpose(1, 2)
        e.k = rope_complex(self.wk(x).view(B, T, GROUPS, D)).transpose(1, 2)
        e.mask = causal(T)
        return e


@zoo("gqa_repeat_interleave")
class RepeatInterleave(Grouped):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self.wq(x), HEADS), heads(self.wk(x), GROUPS), heads(self.wv(x), GROUPS)
        k, v = torch.repeat_interleave(k, R, dim=1), v.repeat_interleave(R, dim=1)
        a = ((q @ k.transpose(-1, -2)) / D**0.5).softmax(-1)
        return self.wo((a @ v).transpose(1, 2).flatten(2))


@zoo("gqa_einops_repeat")
class EinopsRepeat(Grouped):
    def forward(self, x: Tensor) -> Tensor:
        q = rearrange(self.wq(x), "b n (h d) -> b h n d", h=HEADS)
        k, v = (rearrange(t, "b n (h d) -> b h n d", h=GROUPS) for t in (self.wk(x), self.wv(x)))
        k, v = (repeat(t, "b h n d -> b (h r) n d", r=R) for t in (k, v))
        a = (einsum(q, k, "b h i d, b h j d -> b h i j") * D**-0.5).softmax(dim=-1)
        return self.wo(rearrange(einsum(a, v, "b h i j, b h j d -> b h i d"), "b h n d -> b n (h d)"))


@zoo("gqa_broadcast_matmul_5d")
class Broadcast5D(Grouped):
    """q as B G R T D against k as B G 1 S D."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.wq(x).view(B, T, GROUPS, R, D).permute(0, 2, 3, 1, 4)
        k = self.wk(x).view(B, T, GROUPS, D).transpose(1, 2).unsqueeze(2)
        v = self.wv(x).view(B, T, GROUPS, D).transpose(1, 2).unsqueeze(2)
        scores = torch.matmul(q, k.transpose(-2, -1)) * D**-0.5
        scores = scores.masked_fill(~causal(T), float("-inf"))
        out = torch.matmul(F.softmax(scores, dim=-1), v)
        return self.wo(out.permute(0, 3, 1, 2, 4).reshape(B, T, E))

    def expected(self, x: Tensor) -> Expected:
        e = super().expected(x)
        e.mask = causal(T)
        return e


@zoo("gqa_einsum_group_axes")
class GroupAxes(Grouped):
    def forward(self, x: Tensor) -> Tensor:
        q = rearrange(self.wq(x), "b t (g r d) -> b t g r d", g=GROUPS, r=R)
        k, v = (rearrange(t, "b s (g d) -> b s g d", g=GROUPS) for t in (self.wk(x), self.wv(x)))
        sim = torch.einsum("btgrd,bsgd->bgrts", q, k) / D**0.5
        sim = sim.masked_fill(~causal(T), -1e30)
        out = torch.einsum("bgrts,bsgd->btgrd", sim.softmax(dim=-1), v)
        return self.wo(rearrange(out, "b t g r d -> b t (g r d)"))

    def expected(self, x: Tensor) -> Expected:
        e = super().expected(x)
        e.mask = causal(T)
        return e


@zoo("mqa_k_without_head_axis")
class MultiQuery(Grouped):
    """One key head, and no axis for it."""

    groups = 1

    def forward(self, x: Tensor) -> Tensor:
        q = rearrange(self.wq(x), "b n (h d) -> b h n d", h=HEADS) * D**-0.5
        k, v = self.wk(x), self.wv(x)
        sim = torch.einsum("bhid,bjd->bhij", q, k)
        sim = sim.masked_fill(~causal(T), -torch.finfo(sim.dtype).max)
        out = torch.einsum("bhij,bjd->bhid", sim.softmax(dim=-1), v)
        return self.wo(rearrange(out, "b h n d -> b n (h d)"))

    def expected(self, x: Tensor) -> Expected:
        e = super().expected(x)
        e.q, e.scale, e.mask = e.q * D**-0.5, 1.0, causal(T)
        return e


@zoo("mqa_queries_stacked_on_time")
class StackedQueries(Grouped):
    """GPTBigCode: heads folded into the query axis (B, T*H, D) against one key head."""

    groups = 1

    def forward(self, x: Tensor) -> Tensor:
        query = self.wq(x).reshape(B, T * HEADS, D)
        key, value = self.wk(x).transpose(-1, -2), self.wv(x)
        w = torch.baddbmm(query.new_zeros(()).expand(B, T * HEADS, T), query, key, beta=0, alpha=D**-0.5)
        w = w.view(B, T, HEADS, T)
        w = torch.where(causal(T).view(1, T, 1, T), w, torch.finfo(w.dtype).min)
        w = F.softmax(w, dim=-1)
        out = torch.bmm(w.view(B, T * HEADS, T), value).view(B, T, E)
        return self.wo(out)

    def expected(self, x: Tensor) -> Expected:
        e = super().expected(x)
        e.mask = causal(T)
        return e


@zoo("mqa_broadcast_head_axis_1")
class BroadcastOne(Grouped):
    """k and v keep a head axis of size 1 and matmul broadcasts."""

    groups = 1

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self.wq(x), HEADS), self.wk(x).unsqueeze(1), self.wv(x)[:, None]
        a = F.softmax(q @ k.mT / math.sqrt(D), -1)
        return self.wo((a @ v).transpose(1, 2).reshape(B, T, -1))
