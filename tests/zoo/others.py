"""Sub-modules, two calls in one forward, cross-attention, pooling, no batch, gates, norms."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tests.reference import causal, draw, heads, merge
from tests.zoo.base import CROSS, B, D, E, Entry, Expected, H, S, T, zoo


def clones(module: nn.Module, n: int) -> nn.ModuleList:
    return nn.ModuleList([copy.deepcopy(module) for _ in range(n)])


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """Compute 'Scaled Dot Product Attention'."""
    d_k = query.size(-1)
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(d_k)
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -1e9)
    p_attn = scores.softmax(dim=-1)
    if dropout is not None:
        p_attn = dropout(p_attn)
    return torch.matmul(p_attn, value), p_attn


@zoo("annotated_transformer", ((B, T, E), (B, S, E), (B, S, E)))
@zoo("annotated_transformer_train", ((B, T, E), (B, S, E), (B, S, E)), arguments={"dropout": 0.2}, train=True)
class MultiHeadedAttention(Entry):
    """A free function does the attention; the cloned projections are one list."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.d_k, self.h, self.p = D, H, dropout
        self.linears = clones(nn.Linear(E, E), 4)
        for linear in self.linears:
            nn.init.normal_(linear.weight, std=0.3)
        self.dropout = nn.Dropout(p=dropout)
        self.register_buffer("mask", torch.ones(B, 1, S))
        self.mask[0, :, -2:] = 0

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = self.mask.unsqueeze(1)
        nbatches = query.size(0)
        query, key, value = [
            lin(x).view(nbatches, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, value), strict=False)
        ]
        x, _ = attention(query, key, value, mask=mask, dropout=self.dropout)
        x = x.transpose(1, 2).contiguous().view(nbatches, -1, self.h * self.d_k)
        return self.linears[-1](x)

    def expected(self, query: Tensor, key: Tensor, value: Tensor) -> Expected:
        inputs = (query, key, value)
        q, k, v = (heads(lin(x), H) for lin, x in zip(list(self.linears)[:3], inputs, strict=True))
        return Expected(q, k, v, scale=D**-0.5, mask=self.mask.unsqueeze(1) != 0, dropout=self.p)

    def finish(self, outputs: list[Tensor], *inputs: Tensor) -> Tensor:
        return self.linears[-1](merge(outputs[0]))


class ScaledDotProductAttention(nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.dropout = nn.Dropout(0.1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        attn = torch.matmul(q / self.temperature, k.transpose(2, 3))
        attn = attn.masked_fill(mask == 0, -1e9)
        attn = self.dropout(F.softmax(attn, dim=-1))
        return torch.matmul(attn, v), attn


@zoo("attention_in_a_sub_module")
class JadoreMultiHead(Entry):
    """The call happens in a sub-module, and that is its path; q is divided, so the scale is 1."""

    out = "fc"

    def __init__(self) -> None:
        super().__init__()
        self.w_qs, self.w_ks, self.w_vs = (nn.Linear(E, E, bias=False) for _ in range(3))
        self.fc = nn.Linear(E, E, bias=False)
        self.attention = ScaledDotProductAttention(temperature=D**0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).view(B, T, H, D).transpose(1, 2) for w in (self.w_qs, self.w_ks, self.w_vs))
        q, _ = self.attention(q, k, v, mask=torch.tril(torch.ones(1, 1, T, T)))
        return self.fc(q.transpose(1, 2).contiguous().view(B, T, -1))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = (heads(w(x), H) for w in (self.w_qs, self.w_ks, self.w_vs))
        return Expected(q / self.attention.temperature, k, v, mask=causal(T), path=".attention")


@zoo("whisper_quarter_power_on_both", CROSS, tol=1e-5)
class Whisper(Entry):
    """D^-1/4 on q and on k; k leaves the projection transposed; the mask is added in place."""

    out = "out_"

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(E, E), nn.Linear(E, E, bias=False), nn.Linear(E, E)
        self.out_ = nn.Linear(E, E)

    def forward(self, x: Tensor, xa: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(xa), self.value(xa)
        scale = (E // H) ** -0.25
        q = q.view(*q.shape[:2], H, -1).permute(0, 2, 1, 3) * scale
        k = k.view(*k.shape[:2], H, -1).permute(0, 2, 3, 1) * scale
        v = v.view(*v.shape[:2], H, -1).permute(0, 2, 1, 3)
        qk = q @ k
        qk += torch.empty(S, S).fill_(-torch.inf).triu_(1)[:T, :S]
        qk = qk.float()
        w = F.softmax(qk, dim=-1).to(q.dtype)
        return self.out_((w @ v).permute(0, 2, 1, 3).flatten(start_dim=2))

    def expected(self, x: Tensor, xa: Tensor) -> Expected:
        scale = (E // H) ** -0.25
        q, k = heads(self.query(x), H) * scale, heads(self.key(xa), H) * scale
        return Expected(q, k, heads(self.value(xa), H), mask=causal(T, S))


@zoo("timm_unbind_with_qk_norm")
class TimmAttention(Entry):
    out = "proj"

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E, bias=True), nn.Linear(E, E)
        self.q_norm, self.k_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, H, D).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        q = q * D**-0.5
        attn = q @ k.transpose(-2, -1)
        attn = attn.softmax(dim=-1)
        attn = self.attn_drop(attn)
        x = attn @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B_, N, C)))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = self.qkv(x).reshape(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        return Expected(self.q_norm(q) * D**-0.5, self.k_norm(k), v)


@zoo("self_then_cross_in_one_module", CROSS)
class SelfThenCross(Entry):
    """Two attentions in one forward: two calls at one path, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.self_qkv, self.cross_q, self.cross_kv = nn.Linear(E, 3 * E), nn.Linear(E, E), nn.Linear(E, 2 * E)
        self.proj = nn.Linear(E, E)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        s = q @ k.transpose(-1, -2) / D**0.5
        if mask is not None:
            s = s.masked_fill(~mask, -torch.inf)
        return (s.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.attend(*(heads(t, H) for t in self.self_qkv(x).chunk(3, -1)), causal(T))
        k, v = self.cross_kv(y).chunk(2, -1)
        return self.proj(x + self.attend(heads(self.cross_q(x), H), heads(k, H), heads(v, H), None))

    def expected(self, x: Tensor, y: Tensor) -> list[Expected]:
        q, k, v = (heads(t, H) for t in self.self_qkv(x).chunk(3, -1))
        x = x + self.attend(q, k, v, causal(T))
        first = Expected(q, k, v, scale=D**-0.5, mask=causal(T))
        k, v = (heads(t, H) for t in self.cross_kv(y).chunk(2, -1))
        return [first, Expected(heads(self.cross_q(x), H), k, v, scale=D**-0.5)]

    def finish(self, outputs: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return self.proj(x + merge(outputs[0]) + merge(outputs[1]))


@zoo("cross_other_widths", ((B, T, E), (B, S, 10)))
class CrossWidths(Entry):
    """The memory has another width, and values another head width than queries."""

    out = "o"

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(E, 4 * 3), nn.Linear(10, 4 * 3), nn.Linear(10, 4 * 5)
        self.o = nn.Linear(20, E)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = self.q(x).reshape(B, T, 4, 3), self.k(memory).reshape(B, S, 4, 3), self.v(memory).reshape(B, S, 4, 5)
        w = torch.softmax(q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * 3**-0.5, dim=-1)
        return self.o((w @ v.transpose(1, 2)).transpose(1, 2).reshape(B, T, 20))

    def expected(self, x: Tensor, memory: Tensor) -> Expected:
        q, k, v = heads(self.q(x), 4), heads(self.k(memory), 4), heads(self.v(memory), 4)
        return Expected(q, k, v, scale=3**-0.5)


@zoo("unbatched_single_head_2d", ((T, E),))
class Unbatched(Entry):
    """T x D, nothing else: read as one batch and one head."""

    def __init__(self) -> None:
        super().__init__()
        self.Wq, self.Wk, self.Wv = (nn.Parameter(draw(E, 6, seed=i, std=0.4)) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        Q, K, V = x @ self.Wq, x @ self.Wk, x @ self.Wv
        A = torch.softmax(Q @ K.T / math.sqrt(K.shape[1]), dim=1)
        return A @ V

    def expected(self, x: Tensor) -> Expected:
        q, k, v = ((x @ w)[None, None] for w in (self.Wq, self.Wk, self.Wv))
        return Expected(q, k, v, scale=6**-0.5)

    def finish(self, outputs: list[Tensor], x: Tensor) -> Tensor:
        return outputs[0][0, 0]


@zoo("luong_dot_keys_are_values", ((B, T, E), (B, S, E)))
class LuongDot(Entry):
    """The encoder's states are keys and values alike, no projection, no scale."""

    def forward(self, decoder_hidden: Tensor, encoder_outputs: Tensor) -> Tensor:
        attn_energies = torch.bmm(decoder_hidden, encoder_outputs.transpose(1, 2))
        weights = F.softmax(attn_energies, dim=2)
        context = weights.bmm(encoder_outputs)
        return torch.cat((context, decoder_hidden), dim=2)

    def expected(self, decoder_hidden: Tensor, encoder_outputs: Tensor) -> Expected:
        states = encoder_outputs.unsqueeze(1)
        return Expected(decoder_hidden.unsqueeze(1), states, states)

    def finish(self, outputs: list[Tensor], decoder_hidden: Tensor, encoder_outputs: Tensor) -> Tensor:
        return torch.cat((outputs[0].squeeze(1), decoder_hidden), dim=2)


@zoo("learned_query_pooling", ((B, S, E),))
class AttentionPool(Entry):
    """The query is a parameter without a batch axis; matmul broadcasts it."""

    out = "proj"

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(draw(H, 2, D, seed=13))
        self.kv, self.proj = nn.Linear(E, 2 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).view(B, S, 2, H, D).permute(2, 0, 3, 1, 4)
        attn = torch.matmul(self.query, k.transpose(-2, -1)).mul(D**-0.5).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, 2, E))

    def expected(self, x: Tensor) -> Expected:
        k, v = (heads(t, H) for t in self.kv(x).chunk(2, -1))
        return Expected(self.query.expand(B, H, 2, D), k, v, scale=D**-0.5)


@zoo("gated_output")
class Gated(Entry):
    """The kernel's output is gated before the projection; the record holds it ungated."""

    def __init__(self) -> None:
        super().__init__()
        self.qkvg, self.proj = nn.Linear(E, 4 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g = self.qkvg(x).view(B, T, 4, H, D).permute(2, 0, 3, 1, 4).unbind()
        o = torch.softmax(q @ k.mT * D**-0.5, dim=-1) @ v
        o *= torch.sigmoid(g)
        return self.proj(o.transpose(1, 2).flatten(2))

    def expected(self, x: Tensor) -> Expected:
        q, k, v, _ = (heads(t, H) for t in self.qkvg(x).chunk(4, -1))
        return Expected(q, k, v, scale=D**-0.5)

    def finish(self, outputs: list[Tensor], x: Tensor) -> Tensor:
        return self.proj(merge(outputs[0]) * torch.sigmoid(self.qkvg(x).chunk(4, -1)[3]))
