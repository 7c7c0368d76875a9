"""The same product in other notations: einops, einsum in many index orders, keys times queries."""

from __future__ import annotations

import einops
import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, einsum, nn

from tests.reference import causal, heads
from tests.zoo.base import CROSS, B, D, E, Entry, Expected, H, T, zoo


@zoo("vit_rearrange_chunk")
@zoo("vit_train_dropout_module", arguments={"dropout": 0.4}, train=True)
class ViTAttention(Entry):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.scale, self.p = H, D**-0.5, dropout
        self.norm = nn.LayerNorm(E)
        self.attend = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)
        self.to_qkv = nn.Linear(E, 3 * E, bias=False)
        self.to_out = nn.Sequential(nn.Linear(E, E), nn.Dropout(0.0))
        self.out = "to_out"

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        qkv = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in qkv)
        dots = torch.matmul(q, k.transpose(-1, -2)) * self.scale
        attn = self.attend(dots)
        attn = self.dropout(attn)
        out = torch.matmul(attn, v)
        out = rearrange(out, "b h n d -> b n (h d)")
        return self.to_out(out)

    def expected(self, x: Tensor) -> Expected:
        q, k, v = (heads(part, H) for part in self.to_qkv(self.norm(x)).chunk(3, dim=-1))
        return Expected(q, k, v, scale=self.scale, dropout=self.p)


@zoo("lucidrains_einsum_minus_amax")
class PerceiverStyle(Entry):
    """The row maximum is taken off before the softmax, which changes nothing about the attention."""

    out = "to_out"

    def __init__(self) -> None:
        super().__init__()
        self.scale = D**-0.5
        self.to_q, self.to_kv = nn.Linear(E, E, bias=False), nn.Linear(E, 2 * E, bias=False)
        self.to_out = nn.Linear(E, E)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, h = x.shape[1], H
        q = self.to_q(x)
        k, v = self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=h) for t in (q, k, v))
        q = q * self.scale
        sim = einsum("b h i d, b h j d -> b h i j", q, k)
        causal_mask = torch.ones((n, n), dtype=torch.bool, device=x.device).triu(1)
        sim = sim.masked_fill(causal_mask, -torch.finfo(sim.dtype).max)
        sim = sim - sim.amax(dim=-1, keepdim=True).detach()
        attn = sim.softmax(dim=-1)
        out = einsum("b h i j, b h j d -> b h i d", attn, v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))

    def expected(self, x: Tensor) -> Expected:
        k, v = self.to_kv(x).chunk(2, dim=-1)
        return Expected(heads(self.to_q(x), H) * self.scale, heads(k, H), heads(v, H), mask=causal(T))


@zoo("einsum_bihd_bjhd_bhij", CROSS)
class HeadsLast(Entry):
    """No transposes at all: the heads stay where the projection left them."""

    out = "wo"

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(E, E) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.wq(x).unflatten(-1, (H, D))
        k = self.wk(context).unflatten(-1, (H, D))
        v = self.wv(context).unflatten(-1, (H, D))
        a = torch.einsum("bihd,bjhd->bhij", q, k).div(D**0.5).softmax(dim=-1)
        return self.wo(torch.einsum("bhij,bjhd->bihd", a, v).flatten(2))

    def expected(self, x: Tensor, context: Tensor) -> Expected:
        return Expected(heads(self.wq(x), H), heads(self.wk(context), H), heads(self.wv(context), H), scale=D**-0.5)


@zoo("tutorial_einsum_nqhd", ((B, T, E), (B, T, E), (B, T, E)))
class SelfAttentionTutorial(Entry):
    """Projects per head after the split, scales by the whole width, masks with -1e20."""

    out = "fc_out"

    def __init__(self) -> None:
        super().__init__()
        self.values, self.keys, self.queries = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.fc_out = nn.Linear(E, E)
        self.register_buffer("mask", torch.ones(B, 1, 1, T))
        self.mask[0, ..., -1] = 0

    def forward(self, values: Tensor, keys: Tensor, query: Tensor) -> Tensor:
        N = query.shape[0]
        value_len, key_len, query_len = values.shape[1], keys.shape[1], query.shape[1]
        values = self.values(values.reshape(N, value_len, H, D))
        keys = self.keys(keys.reshape(N, key_len, H, D))
        queries = self.queries(query.reshape(N, query_len, H, D))
        energy = torch.einsum("nqhd,nkhd->nhqk", [queries, keys])
        energy = energy.masked_fill(self.mask == 0, float("-1e20"))
        attention = torch.softmax(energy / (E ** (1 / 2)), dim=3)
        out = torch.einsum("nhql,nlhd->nqhd", [attention, values]).reshape(N, query_len, E)
        return self.fc_out(out)

    def expected(self, values: Tensor, keys: Tensor, query: Tensor) -> Expected:
        q, k, v = (
            linear(x.view(B, T, H, D)).transpose(1, 2)
            for linear, x in ((self.queries, query), (self.keys, keys), (self.values, values))
        )
        return Expected(q, k, v, scale=E**-0.5, mask=self.mask != 0)


@zoo("einsum_heads_innermost")
class HeadsInnermost(Entry):
    """Scores as b t s h: the softmax is over the axis in the middle."""

    out = "o"

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(B, T, 3, H, D).unbind(2)
        logits = torch.einsum("bthd,bshd->btsh", q, k) * D**-0.5
        probs = torch.softmax(logits, dim=2)
        return self.o(torch.einsum("btsh,bshd->bthd", probs, v).reshape(B, T, E))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = self.qkv(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        return Expected(q, k, v, scale=D**-0.5)


@zoo("einops_einsum", CROSS)
class EinopsEinsum(Entry):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Sequential(nn.Linear(E, E), Rearrange("b t (h d) -> b t h d", h=H))
        self.k = nn.Sequential(nn.Linear(E, E), Rearrange("b s (h d) -> b s h d", h=H))
        self.v = nn.Sequential(nn.Linear(E, E), Rearrange("b s (h d) -> b s h d", h=H))
        self.o = nn.Linear(E, E)
        self.out = "o"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = einops.einsum(self.q(x), self.k(y), "b t h d, b s h d -> b h t s")
        scores = scores / D**0.5
        pattern = einops.einsum(scores.softmax(dim=-1), self.v(y), "b h t s, b s h d -> b t h d")
        return self.o(einops.rearrange(pattern, "b t h d -> b t (h d)"))

    def expected(self, x: Tensor, y: Tensor) -> Expected:
        return Expected(heads(self.q[0](x), H), heads(self.k[0](y), H), heads(self.v[0](y), H), scale=D**-0.5)


@zoo("keys_times_queries_dim_minus_2", CROSS)
class KeysTimesQueries(Entry):
    """Scores are S x T: k @ q^T, and the softmax runs over dim=-2."""

    out = "proj"

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(E, E), nn.Linear(E, 2 * E), nn.Linear(E, E)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.q(x).view(B, -1, H, D).transpose(1, 2)
        k, v = self.kv(y).view(B, -1, 2, H, D).permute(2, 0, 3, 1, 4)
        att = k @ q.transpose(-1, -2)
        att = att * D**-0.5
        att = att.softmax(dim=-2)
        out = att.transpose(-1, -2) @ v
        return self.proj(out.transpose(1, 2).flatten(2))

    def expected(self, x: Tensor, y: Tensor) -> Expected:
        k, v = (heads(part, H) for part in self.kv(y).chunk(2, dim=-1))
        return Expected(heads(self.q(x), H), k, v, scale=D**-0.5)


@zoo("channels_first_columns", ((B, E, T),))
class ColumnsAsPositions(Entry):
    """Everything is D x T: scores k^T q, softmax over dim=-2, values times weights (SuperGlue-like)."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.ModuleList([nn.Conv1d(E, E, kernel_size=1) for _ in range(3)])
        self.merge = nn.Conv1d(E, E, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = [conv(x).view(B, D, H, -1) for conv in self.proj]
        scores = torch.einsum("bdhn,bdhm->bhnm", query, key) / D**0.5
        prob = torch.nn.functional.softmax(scores, dim=-1)
        out = torch.einsum("bhnm,bdhm->bdhn", prob, value)
        return self.merge(out.contiguous().view(B, D * H, -1))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = (conv(x).view(B, D, H, T).permute(0, 2, 3, 1) for conv in self.proj)
        return Expected(q, k, v, scale=D**-0.5)

    def finish(self, outputs: list[Tensor], x: Tensor) -> Tensor:
        return self.merge(outputs[0].permute(0, 3, 1, 2).reshape(B, E, T))


@zoo("einsum_ellipsis")
class Ellipsis(Entry):
    """Leading axes by an ellipsis, uppercase indices, the scale inside the softmax call."""

    out = "c"

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.a(x), "B T (n H D) -> n B H T D", n=3, H=H)
        A = F.softmax(torch.einsum("...TD,...SD->...TS", q, k) * D**-0.5, -1)
        return self.c(rearrange(torch.einsum("...TS,...SE->...TE", A, v), "B H T E -> B T (H E)"))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = (heads(part, H) for part in self.a(x).chunk(3, dim=-1))
        return Expected(q, k, v, scale=D**-0.5)
