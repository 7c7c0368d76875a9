"""Decoder-only language models, each in the manner of the people who wrote it."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tests.reference import causal, heads
from tests.zoo.base import SELF, D, E, Entry, Expected, H, T, zoo


@zoo("nanogpt")
@zoo("nanogpt_train", train=True, arguments={"dropout": 0.3})
class CausalSelfAttention(Entry):
    out = "c_proj"

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.c_attn = nn.Linear(E, 3 * E)
        self.c_proj = nn.Linear(E, E)
        self.attn_dropout = nn.Dropout(dropout)
        self.register_buffer("bias", torch.tril(torch.ones(T, T)).view(1, 1, T, T))
        self.n_head, self.n_embd, self.dropout = H, E, dropout

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        q = q.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        v = v.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        att = self.attn_dropout(att)
        y = att @ v
        y = y.transpose(1, 2).contiguous().view(b, t, c)
        return self.c_proj(y)

    def expected(self, x: Tensor) -> Expected:
        q, k, v = (heads(part, H) for part in self.c_attn(x).chunk(3, dim=-1))
        return Expected(q, k, v, scale=D**-0.5, mask=causal(T), dropout=self.dropout)


@zoo("mingpt")
class MinGPTAttention(Entry):
    out = "proj"

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(E, E)
        self.query = nn.Linear(E, E)
        self.value = nn.Linear(E, E)
        self.proj = nn.Linear(E, E)
        self.register_buffer("mask", torch.tril(torch.ones(T, T)).view(1, 1, T, T))

    def forward(self, x: Tensor) -> Tensor:
        B_, T_, C = x.size()
        k = self.key(x).view(B_, T_, H, C // H).transpose(1, 2)
        q = self.query(x).view(B_, T_, H, C // H).transpose(1, 2)
        v = self.value(x).view(B_, T_, H, C // H).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        att[:, :, self.mask[0, 0, :T_, :T_] == 0] = float("-inf")
        att = torch.softmax(att, dim=-1)
        y = att @ v
        return self.proj(y.transpose(1, 2).contiguous().view(B_, T_, C))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = heads(self.query(x), H), heads(self.key(x), H), heads(self.value(x), H)
        return Expected(q, k, v, scale=1 / math.sqrt(D), mask=causal(T))


class Head(nn.Module):
    """One head of self-attention."""

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.key = nn.Linear(E, head_size, bias=False)
        self.query = nn.Linear(E, head_size, bias=False)
        self.value = nn.Linear(E, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(T, T)))
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        _, t, _ = x.shape
        k = self.key(x)
        q = self.query(x)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(self.tril[:t, :t] == 0, float("-inf"))
        wei = F.softmax(wei, dim=-1)
        wei = self.dropout(wei)
        return wei @ self.value(x)


@zoo("lecture_heads")
class LectureMultiHead(Entry):
    """A ModuleList of single heads: each head is a call of its own, at its own path."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head(E // 2) for _ in range(2)])
        self.proj = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.cat([h(x) for h in self.heads], dim=-1)
        return self.proj(out)

    def expected(self, x: Tensor) -> list[Expected]:
        return [
            Expected(
                head.query(x).unsqueeze(1),
                head.key(x).unsqueeze(1),
                head.value(x).unsqueeze(1),
                scale=(E // 2) ** -0.5,
                mask=causal(T),
                path=f".heads.{i}",
            )
            for i, head in enumerate(self.heads)
        ]

    def finish(self, outputs: list[Tensor], x: Tensor) -> Tensor:
        return self.proj(torch.cat([o.squeeze(1) for o in outputs], dim=-1))


class Conv1D(nn.Module):
    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.25)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        x_size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x_size)


@zoo("gpt1_times_mask_minus_1e4")
class GPT1Attention(Entry):
    """The mask multiplies the scores and then takes 10000 off: ``w * b - 1e4 * (1 - b)``."""

    out = "c_proj"

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = Conv1D(3 * E, E)
        self.c_proj = Conv1D(E, E)
        self.register_buffer("b", torch.tril(torch.ones(T, T)).view(1, 1, T, T))

    def split_heads(self, x: Tensor, k: bool = False) -> Tensor:
        x = x.view(*x.size()[:-1], H, x.size(-1) // H)
        return x.permute(0, 2, 3, 1) if k else x.permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.c_attn(x).split(E, dim=2)
        query, key, value = self.split_heads(query), self.split_heads(key, k=True), self.split_heads(value)
        w = torch.matmul(query, key)
        w = w / math.sqrt(value.size(-1))
        w = w * self.b + -1e4 * (1 - self.b)
        w = nn.Softmax(dim=-1)(w)
        a = torch.matmul(w, value)
        a = a.permute(0, 2, 1, 3).contiguous()
        return self.c_proj(a.view(*a.size()[:-2], E))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = (heads(part, H) for part in self.c_attn(x).chunk(3, dim=-1))
        return Expected(q, k, v, scale=D**-0.5, mask=causal(T), masked_scores=False)


@zoo("gpt2_where_and_padding")
class GPT2Attention(Entry):
    """Causal by torch.where with the dtype's minimum, padding by an additive mask, the scale as a tensor."""

    out = "c_proj"

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(3 * E, E), Conv1D(E, E)
        self.register_buffer("bias", torch.tril(torch.ones((T, T), dtype=torch.bool)).view(1, 1, T, T))
        self.attn_dropout = nn.Dropout(0.1)

    def padding(self, x: Tensor) -> Tensor:
        keep = torch.ones(x.shape[0], 1, 1, x.shape[1], dtype=torch.bool)
        keep[0, ..., -2:] = False
        return keep

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.c_attn(x).split(E, dim=2)
        shape = (*x.shape[:-1], -1, D)
        query, key, value = (t.view(shape).transpose(1, 2) for t in (query, key, value))
        attention_mask = (1.0 - self.padding(x).to(x.dtype)) * torch.finfo(x.dtype).min
        w = torch.matmul(query, key.transpose(-1, -2))
        w = w / torch.full([], value.size(-1) ** 0.5, dtype=w.dtype, device=w.device)
        causal_mask = self.bias[:, :, :T, :T]
        mask_value = torch.full([], torch.finfo(w.dtype).min, dtype=w.dtype, device=w.device)
        w = torch.where(causal_mask, w.to(w.dtype), mask_value)
        w = w + attention_mask
        w = nn.functional.softmax(w, dim=-1)
        w = w.type(value.dtype)
        w = self.attn_dropout(w)
        out = torch.matmul(w, value).transpose(1, 2)
        return self.c_proj(out.reshape(*out.shape[:-2], -1).contiguous())

    def expected(self, x: Tensor) -> Expected:
        q, k, v = (heads(part, H) for part in self.c_attn(x).chunk(3, dim=-1))
        return Expected(q, k, v, scale=D**-0.5, mask=causal(T) & self.padding(x))


@zoo("opt_folded_with_floor", SELF)
class OPTAttention(Entry):
    """Heads in the batch; q scaled; the mask added through a 4-D view and floored with torch.max."""

    out = "out_proj"

    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj = nn.Linear(E, E), nn.Linear(E, E)
        self.q_proj, self.out_proj = nn.Linear(E, E), nn.Linear(E, E)
        self.scaling = D**-0.5

    def _shape(self, tensor: Tensor, seq_len: int, bsz: int) -> Tensor:
        return tensor.view(bsz, seq_len, H, D).transpose(1, 2).contiguous()

    def forward(self, hidden_states: Tensor) -> Tensor:
        bsz, tgt_len, _ = hidden_states.size()
        query_states = self.q_proj(hidden_states) * self.scaling
        key_states = self._shape(self.k_proj(hidden_states), -1, bsz)
        value_states = self._shape(self.v_proj(hidden_states), -1, bsz)
        proj_shape = (bsz * H, -1, D)
        query_states = self._shape(query_states, tgt_len, bsz).view(*proj_shape)
        key_states = key_states.view(*proj_shape)
        value_states = value_states.view(*proj_shape)
        src_len = key_states.size(1)
        attn_weights = torch.bmm(query_states, key_states.transpose(1, 2))
        low = torch.finfo(attn_weights.dtype).min
        attention_mask = torch.full((tgt_len, src_len), low, dtype=attn_weights.dtype).triu(1)[None, None]
        attn_weights = attn_weights.view(bsz, H, tgt_len, src_len) + attention_mask
        attn_weights = torch.max(attn_weights, torch.tensor(low, dtype=attn_weights.dtype))
        attn_weights = attn_weights.view(bsz * H, tgt_len, src_len)
        attn_weights = nn.functional.softmax(attn_weights, dim=-1)
        attn_probs = nn.functional.dropout(attn_weights, p=0.1, training=self.training)
        attn_output = torch.bmm(attn_probs, value_states)
        attn_output = attn_output.view(bsz, H, tgt_len, D)
        return self.out_proj(attn_output.transpose(1, 2).reshape(bsz, tgt_len, E))

    def expected(self, x: Tensor) -> Expected:
        q = heads(self.q_proj(x) * self.scaling, H)
        return Expected(q, heads(self.k_proj(x), H), heads(self.v_proj(x), H), mask=causal(T))
