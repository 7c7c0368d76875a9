"""Finite additive terms: relative positions, pair biases, ALiBi, and scales that are learned."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import alibi, causal, draw, heads
from tests.zoo.base import CROSS, B, D, E, Entry, Expected, H, S, T, zoo


class Split(Entry):
    out = "o"

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(E, E, bias=False) for _ in range(4))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return heads(self.q(x), H), heads(self.k(x), H), heads(self.v(x), H)


@zoo("t5_position_bias_with_mask_inside", tol=1e-5)
class T5Attention(Split):
    """No scale; the position bias already holds the mask and is added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(2 * T, H)

    def bias(self) -> Tensor:
        distance = torch.arange(T)[None, :] - torch.arange(T)[:, None] + T
        return self.relative_attention_bias(distance).permute(2, 0, 1).unsqueeze(0)

    def forward(self, hidden_states: Tensor) -> Tensor:
        query_states = self.q(hidden_states).view(B, -1, H, D).transpose(1, 2)
        key_states = self.k(hidden_states).view(B, -1, H, D).transpose(1, 2)
        value_states = self.v(hidden_states).view(B, -1, H, D).transpose(1, 2)
        scores = torch.matmul(query_states, key_states.transpose(3, 2))
        mask = torch.full((1, 1, T, T), torch.finfo(scores.dtype).min, dtype=scores.dtype).triu(1)
        position_bias = self.bias() + mask
        scores += position_bias
        attn_weights = nn.functional.softmax(scores.float(), dim=-1).type_as(scores)
        attn_output = torch.matmul(attn_weights, value_states)
        return self.o(attn_output.transpose(1, 2).contiguous().view(B, -1, E))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = self.split(x)
        return Expected(q, k, v, bias=self.bias(), mask=causal(T), masked_scores=False)


@zoo("swin_windows_table_and_shift_mask", ((4, T, E),))
class WindowAttention(Split):
    """Windows in the batch; a table bias; the shift mask (0 or -100) added through a 5-D view."""

    nw = 2

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(draw(2 * T - 1, H, seed=3))
        self.register_buffer("index", torch.arange(T)[:, None] - torch.arange(T)[None, :] + T - 1)
        shift = torch.zeros(self.nw, T, T)
        shift[1, :2, 2:] = shift[1, 2:, :2] = -100.0
        self.register_buffer("mask", shift)

    def forward(self, x: Tensor) -> Tensor:
        B_, N, C = x.shape
        q, k, v = (lin(x).reshape(B_, N, H, C // H).permute(0, 2, 1, 3) for lin in (self.q, self.k, self.v))
        q = q * D**-0.5
        attn = q @ k.transpose(-2, -1)
        relative = self.table[self.index.view(-1)].view(N, N, -1).permute(2, 0, 1).contiguous()
        attn = attn + relative.unsqueeze(0)
        attn = attn.view(B_ // self.nw, self.nw, H, N, N) + self.mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, H, N, N)
        attn = torch.softmax(attn, dim=-1)
        return self.o((attn @ v).transpose(1, 2).reshape(B_, N, C))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = self.split(x)
        mask = (self.mask == 0).repeat(2, 1, 1).unsqueeze(1)
        bias = self.table[self.index].permute(2, 0, 1).unsqueeze(0)
        return Expected(q * D**-0.5, k, v, bias=bias, mask=mask)


@zoo("windows_on_an_axis_of_their_own", ((B, 6, E),))
class Windows5D(Split):
    """B W H N D: the windows are not in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (lin(x).view(B, 2, 3, H, D).transpose(2, 3) for lin in (self.q, self.k, self.v))
        attn = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(D), dim=-1)
        return self.o((attn @ v).transpose(2, 3).reshape(B, 6, E))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = (heads(lin(x).view(B * 2, 3, E), H) for lin in (self.q, self.k, self.v))
        return Expected(q, k, v, scale=D**-0.5)

    def finish(self, outputs: list[Tensor], x: Tensor) -> Tensor:
        return self.o(outputs[0].transpose(1, 2).reshape(B, 6, E))


@zoo("swin_v2_cosine_logit_scale")
class CosineAttention(Split):
    """Normalised q and k; a clamped learned scale for every head."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.log(torch.linspace(2.0, 12.0, H)).view(H, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        logit_scale = torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        attn = attn * logit_scale
        attn = attn.softmax(dim=-1)
        return self.o((attn @ v).transpose(1, 2).reshape(B, T, E))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = self.split(x)
        return Expected(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, scale=self.logit_scale.exp())


@zoo("head_temperature_divided")
class Temperature(Split):
    """A learned temperature for every head, by division, after the usual scale."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.linspace(0.5, 2.0, H))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D)
        scores = scores / self.temperature.view(1, H, 1, 1)
        scores = scores.masked_fill(~causal(T), float("-inf"))
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, E))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = self.split(x)
        scale = D**-0.5 / self.temperature.view(1, H, 1, 1)
        return Expected(q, k, v, scale=scale, mask=causal(T))


@zoo("cross_covariance_over_channels")
class XCA(Split):
    """Attention over channels: q^T k of normalised D x N matrices, temperature by head."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(H, 1, 1) * 1.7)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (lin(x).reshape(B, T, H, D).permute(0, 2, 3, 1) for lin in (self.q, self.k, self.v))
        q = torch.nn.functional.normalize(q, dim=-1)
        k = torch.nn.functional.normalize(k, dim=-1)
        attn = (q @ k.transpose(-2, -1)) * self.temperature
        attn = attn.softmax(dim=-1)
        return self.o((attn @ v).permute(0, 3, 1, 2).reshape(B, T, E))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = (part.transpose(2, 3) for part in self.split(x))
        return Expected(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, scale=self.temperature)

    def finish(self, outputs: list[Tensor], x: Tensor) -> Tensor:
        return self.o(outputs[0].permute(0, 3, 1, 2).reshape(B, T, E))


@zoo("alibi_then_causal")
class AlibiCausal(Split):
    """ALiBi added out of place, the causal mask filled in place."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
        scores = scores + alibi(H, T, T).to(scores)
        scores.masked_fill_(causal(T).logical_not(), float("-inf"))
        return self.o((F.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(B, T, E))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = self.split(x)
        return Expected(q, k, v, scale=D**-0.5, bias=alibi(H, T, T).to(x.dtype), mask=causal(T))


@zoo("two_biases", CROSS)
class TwoBiases(Split):
    """A head bias and a key bias, added one after the other: the record holds their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.head_bias = nn.Parameter(draw(1, H, T, S, seed=1))
        self.key_bias = nn.Parameter(draw(S, seed=2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = heads(self.q(x), H), heads(self.k(y), H), heads(self.v(y), H)
        scores = q @ k.transpose(-1, -2) * (1 / D)
        scores = torch.add(scores, self.head_bias)
        scores.add_(self.key_bias)
        return self.o((torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2))

    def expected(self, x: Tensor, y: Tensor) -> Expected:
        q, k, v = heads(self.q(x), H), heads(self.k(y), H), heads(self.v(y), H)
        return Expected(q, k, v, scale=1 / D, bias=self.head_bias + self.key_bias)


@zoo("shaw_relative_before_scale")
class ShawRelative(Split):
    """(q k^T + q r^T) / sqrt(D): the bias is what is added after the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.relative = nn.Parameter(draw(T, T, D, seed=4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        content = torch.matmul(q, k.transpose(-1, -2))
        position = torch.einsum("bhtd,tsd->bhts", q, self.relative)
        scores = (content + position) / math.sqrt(D)
        return self.o(torch.matmul(F.softmax(scores, dim=-1), v).transpose(1, 2).reshape(B, T, E))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = self.split(x)
        bias = (q.unsqueeze(3) * self.relative).sum(-1) / math.sqrt(D)
        return Expected(q, k, v, scale=D**-0.5, bias=bias)


@zoo("transformer_xl_ijbn", ((T, B, E),), tol=1e-5)
class TransformerXL(Entry):
    """Scores as i j b n, softmax over dim=1; two learned query biases; the shifted position term."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_net, self.r_net, self.o_net = nn.Linear(E, 3 * E), nn.Linear(E, E, bias=False), nn.Linear(E, E)
        self.r_w_bias, self.r_r_bias = nn.Parameter(draw(H, D, seed=6)), nn.Parameter(draw(H, D, seed=7))
        self.register_buffer("r", draw(T, E, seed=8))

    def _rel_shift(self, x: Tensor) -> Tensor:
        zero_pad = torch.zeros((x.size(0), 1, *x.size()[2:]), dtype=x.dtype)
        x_padded = torch.cat([zero_pad, x], dim=1)
        return x_padded.view(x.size(1) + 1, x.size(0), *x.size()[2:])[1:].view_as(x)

    def forward(self, w: Tensor) -> Tensor:
        w_head_q, w_head_k, w_head_v = (t.view(T, B, H, D) for t in torch.chunk(self.qkv_net(w), 3, dim=-1))
        r_head_k = self.r_net(self.r).view(T, H, D)
        AC = torch.einsum("ibnd,jbnd->ijbn", (w_head_q + self.r_w_bias, w_head_k))
        BD = self._rel_shift(torch.einsum("ibnd,jnd->ijbn", (w_head_q + self.r_r_bias, r_head_k)))
        attn_score = AC + BD
        attn_score.mul_(1 / (D**0.5))
        mask = torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1)
        attn_score = attn_score.float().masked_fill(mask[:, :, None, None], -float("inf")).type_as(attn_score)
        attn_prob = F.softmax(attn_score, dim=1)
        attn_vec = torch.einsum("ijbn,jbnd->ibnd", (attn_prob, w_head_v))
        return self.o_net(attn_vec.contiguous().view(T, B, E))

    def expected(self, w: Tensor) -> Expected:
        q, k, v = (t.view(T, B, H, D) for t in self.qkv_net(w).chunk(3, dim=-1))
        position = torch.einsum("ibnd,jnd->ijbn", q + self.r_r_bias, self.r_net(self.r).view(T, H, D))
        bias = (self._rel_shift(position) * D**-0.5).permute(2, 3, 0, 1)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q + self.r_w_bias, k, v))
        return Expected(q, k, v, scale=D**-0.5, bias=bias, mask=causal(T))

    def finish(self, outputs: list[Tensor], w: Tensor) -> Tensor:
        return self.o_net(outputs[0].permute(2, 0, 1, 3).reshape(T, B, E))


@zoo("pair_bias_rows_of_an_alignment", ((B, 3, T, E),))
class GatedPairBias(Split):
    """AlphaFold-like: an axis of rows before the heads, a pair bias, a -1e9 mask as a bias, a sigmoid gate."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Parameter(draw(1, 1, H, T, T, seed=9))
        self.linear_g = nn.Linear(E, E)
        keep = torch.ones(B, 3, 1, 1, T)
        keep[1, 2, ..., -2:] = 0
        self.register_buffer("keep", keep)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (lin(x).view(*x.shape[:-1], H, -1).transpose(-2, -3) for lin in (self.q, self.k, self.v))
        q = q / math.sqrt(D)
        a = torch.matmul(q, k.permute(0, 1, 2, 4, 3))
        for b in ((1e9 * (self.keep - 1)), self.pair):
            a += b
        a = torch.nn.functional.softmax(a, -1)
        o = torch.matmul(a, v).transpose(-2, -3)
        g = torch.sigmoid(self.linear_g(x)).view(*x.shape[:-1], H, -1)
        o = o * g
        return self.o(o.reshape(*o.shape[:-2], -1))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = (heads(lin(x).view(B * 3, T, E), H) for lin in (self.q, self.k, self.v))
        mask = (self.keep > 0).view(B * 3, 1, 1, T)
        return Expected(q / math.sqrt(D), k, v, bias=self.pair[0], mask=mask, masked_scores=False)

    def finish(self, outputs: list[Tensor], x: Tensor) -> Tensor:
        merged = outputs[0].transpose(1, 2).reshape(B, 3, T, E)
        return self.o(merged * torch.sigmoid(self.linear_g(x)))
