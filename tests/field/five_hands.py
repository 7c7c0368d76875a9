"""One small GPT, written by five hands: the same weights and the same mathematics, and nothing else in common."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, einsum

VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS = 30, 16, 32, 4, 2

Weights = dict[str, Any]


def weights(seed: int = 0) -> Weights:
    """Drawn large enough that attention is far from uniform; matrices are (in, out)."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=draw) * std

    def layer() -> Weights:
        matrix = {x: normal(WIDTH, WIDTH, std=1.5 / WIDTH**0.5) for x in ("q", "k", "v", "o")}
        bias = {f"{x}_bias": normal(WIDTH, std=0.1) for x in ("q", "k", "v", "o")}
        up, down = normal(WIDTH, 4 * WIDTH, std=0.2), normal(4 * WIDTH, WIDTH, std=0.1)
        norms = {f"norm{i}": 1 + normal(WIDTH, std=0.1) for i in (1, 2)}
        return {**matrix, **bias, **norms, "up": up, "down": down}

    tokens, positions = normal(VOCABULARY, WIDTH), normal(CONTEXT, WIDTH)
    return {"tokens": tokens, "positions": positions, "layers": [layer() for _ in range(LAYERS)]}


def reference(w: Weights, ids: Tensor) -> tuple[Tensor, Tensor]:
    """In float64 and plain steps: the logits, and the weights, L B H T T."""
    x = w["tokens"].double()[ids] + w["positions"].double()[: ids.shape[1]]
    kept = []
    for p in w["layers"]:
        y = F.layer_norm(x, (WIDTH,)) * p["norm1"].double()
        heads = {}
        for name in "qkv":
            flat = y @ p[name].double() + p[f"{name}_bias"].double()
            heads[name] = torch.stack(flat.split(WIDTH // HEADS, -1), 1)
        scores = torch.einsum("bhid,bhjd->bhij", heads["q"], heads["k"]) / (WIDTH // HEADS) ** 0.5
        later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        a = torch.softmax(torch.where(later, -torch.inf, scores), -1)
        kept.append(a)
        merged = torch.cat((a @ heads["v"]).unbind(1), -1)
        x = x + merged @ p["o"].double() + p["o_bias"].double()
        y = F.layer_norm(x, (WIDTH,)) * p["norm2"].double()
        x = x + F.relu(y @ p["up"].double()) @ p["down"].double()
    return x @ w["tokens"].double().T, torch.stack(kept)


# The first hand: compact and conventional, one projection for q, k and v, views and transposes.


class CausalSelfAttention(nn.Module):
    def __init__(self, p: Weights, flash: bool = True):
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.c_attn.weight.data = torch.cat([p["q"], p["k"], p["v"]], 1).T.contiguous()
        self.c_attn.bias.data = torch.cat([p["q_bias"], p["k_bias"], p["v_bias"]])
        self.c_proj.weight.data, self.c_proj.bias.data = p["o"].T.contiguous(), p["o_bias"].clone()
        self.n_head, self.n_embd, self.flash, self.dropout = HEADS, WIDTH, flash, 0.1
        self.attn_dropout = nn.Dropout(self.dropout)
        self.register_buffer("bias", torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            p = self.dropout if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=p, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self, p: Weights, flash: bool):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.ln_1.weight.data, self.ln_2.weight.data = p["norm1"].clone(), p["norm2"].clone()
        self.attn = CausalSelfAttention(p, flash)
        self.c_fc, self.c_out = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.c_fc.weight.data, self.c_out.weight.data = p["up"].T.contiguous(), p["down"].T.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_out(F.relu(self.c_fc(self.ln_2(x))))


class Compact(nn.Module):
    def __init__(self, w: Weights, flash: bool = True):
        super().__init__()
        blocks = nn.ModuleList(Block(p, flash) for p in w["layers"])
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(VOCABULARY, WIDTH), "wpe": nn.Embedding(CONTEXT, WIDTH), "h": blocks}
        )
        self.transformer.wte.weight.data, self.transformer.wpe.weight.data = w["tokens"].clone(), w["positions"].clone()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(x)


# The second hand: a teacher's, one small module for each single head.


class Head(nn.Module):
    """one head of self-attention"""

    def __init__(self, p: Weights, i: int):
        super().__init__()
        size = WIDTH // HEADS
        mine = slice(i * size, (i + 1) * size)
        for name, long in (("q", "query"), ("k", "key"), ("v", "value")):
            linear = nn.Linear(WIDTH, size)
            linear.weight.data, linear.bias.data = p[name][:, mine].T.contiguous(), p[f"{name}_bias"][mine].clone()
            setattr(self, long, linear)
        self.register_buffer("tril", torch.tril(torch.ones(CONTEXT, CONTEXT)))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        _, t, _ = x.shape
        k = self.key(x)  # (B,T,hs)
        q = self.query(x)  # (B,T,hs)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B,T,hs) @ (B,hs,T) -> (B,T,T)
        wei = wei.masked_fill(self.tril[:t, :t] == 0, float("-inf"))
        wei = F.softmax(wei, dim=-1)
        wei = self.dropout(wei)
        return wei @ self.value(x)


class OneByOne(nn.Module):
    def __init__(self, w: Weights):
        super().__init__()
        self.token_embedding_table = nn.Embedding.from_pretrained(w["tokens"].clone(), freeze=False)
        self.position_embedding_table = nn.Embedding.from_pretrained(w["positions"].clone(), freeze=False)
        self.heads = nn.ModuleList(nn.ModuleList(Head(p, i) for i in range(HEADS)) for p in w["layers"])
        self.rest = nn.ModuleList(
            nn.ParameterDict({k: v.clone() for k, v in p.items() if len(k) > 1 or k == "o"}) for p in w["layers"]
        )

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding_table(idx)
        x = x + self.position_embedding_table(torch.arange(idx.shape[1]))
        for heads, p in zip(self.heads, self.rest, strict=True):
            y = F.layer_norm(x, (WIDTH,), p["norm1"])
            x = x + (torch.cat([h(y) for h in heads], dim=-1) @ p["o"] + p["o_bias"])
            x = x + F.relu(F.layer_norm(x, (WIDTH,), p["norm2"]) @ p["up"]) @ p["down"]
        return x @ self.token_embedding_table.weight.T


# The third hand: einsums and rearranging, and a softmax of its own.


class EinsumAttention(nn.Module):
    def __init__(self, p: Weights):
        super().__init__()
        self.w_qkv = nn.Parameter(torch.stack([p["q"], p["k"], p["v"]]))
        self.b_qkv = nn.Parameter(torch.stack([p["q_bias"], p["k_bias"], p["v_bias"]]))
        self.w_out, self.b_out = nn.Parameter(p["o"].clone()), nn.Parameter(p["o_bias"].clone())

    def forward(self, x: Tensor) -> Tensor:
        qkv = einsum("b n c, s c e -> s b n e", x, self.w_qkv) + self.b_qkv[:, None, None]
        q, k, v = rearrange(qkv, "s b n (h d) -> s b h n d", h=HEADS)
        sim = einsum("b h i d, b h j d -> b h i j", q * q.shape[-1] ** -0.5, k)
        i, j = sim.shape[-2:]
        sim = sim.masked_fill(torch.ones((i, j), dtype=torch.bool).triu(j - i + 1), -torch.finfo(sim.dtype).max)
        sim = (sim - sim.amax(dim=-1, keepdim=True).detach()).exp()
        attn = sim / sim.sum(dim=-1, keepdim=True)
        out = einsum("b h i j, b h j d -> b h i d", attn, v)
        return rearrange(out, "b h n d -> b n (h d)") @ self.w_out + self.b_out


class Einsums(nn.Module):
    def __init__(self, w: Weights):
        super().__init__()
        self.tokens, self.positions = nn.Parameter(w["tokens"].clone()), nn.Parameter(w["positions"].clone())
        self.layers = nn.ModuleList([])
        for p in w["layers"]:
            norms = nn.ParameterList([p["norm1"].clone(), p["norm2"].clone()])
            self.layers.append(
                nn.ModuleList([norms, EinsumAttention(p), nn.ParameterList([p["up"].clone(), p["down"].clone()])])
            )

    def forward(self, x: Tensor) -> Tensor:
        x = F.embedding(x, self.tokens) + rearrange(self.positions[: x.shape[-1]], "n d -> 1 n d")
        for (norm1, norm2), attn, (up, down) in self.layers:
            x = attn(F.layer_norm(x, x.shape[-1:], norm1)) + x
            hidden = einsum("b n c, c e -> b n e", F.layer_norm(x, x.shape[-1:], norm2), up).relu()
            x = einsum("b n e, e c -> b n c", hidden, down) + x
        return einsum("b n c, v c -> b n v", x, self.tokens)


# The fourth hand: after the paper, a free function, cloned layers, a mask of -1e9 that is passed down.


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: nn.Module | None) -> Any:
    "Compute 'Scaled Dot Product Attention'"
    d_k = query.size(-1)
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(d_k)
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -1e9)
    p_attn = scores.softmax(dim=-1)
    if dropout is not None:
        p_attn = dropout(p_attn)
    return torch.matmul(p_attn, value), p_attn


class MultiHeadedAttention(nn.Module):
    def __init__(self, p: Weights):
        super().__init__()
        self.d_k, self.h = WIDTH // HEADS, HEADS
        self.linears = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        for name, linear in zip("qkvo", self.linears, strict=True):
            linear.weight.data, linear.bias.data = p[name].T.contiguous(), p[f"{name}_bias"].clone()
        self.attn: Tensor | None = None
        self.dropout = nn.Dropout(p=0.1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            mask = mask.unsqueeze(1)
        nbatches = query.size(0)
        query, key, value = (
            lin(x).view(nbatches, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, value), strict=False)
        )
        x, self.attn = attention(query, key, value, mask=mask, dropout=self.dropout)
        x = x.transpose(1, 2).contiguous().view(nbatches, -1, self.h * self.d_k)
        return self.linears[-1](x)


class SublayerConnection(nn.Module):
    def __init__(self, norm: Tensor):
        super().__init__()
        self.a_2, self.eps, self.dropout = nn.Parameter(norm.clone()), 1e-5, nn.Dropout(0.1)

    def forward(self, x: Tensor, sublayer: Any) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return x + self.dropout(sublayer(self.a_2 * (x - mean) / (var + self.eps).sqrt()))


class AfterThePaper(nn.Module):
    def __init__(self, w: Weights):
        super().__init__()
        self.lut, self.pe = nn.Parameter(w["tokens"].clone()), nn.Parameter(w["positions"].clone())
        self.self_attn = nn.ModuleList([MultiHeadedAttention(p) for p in w["layers"]])
        self.sublayer = nn.ModuleList([SublayerConnection(p[f"norm{i}"]) for p in w["layers"] for i in (1, 2)])
        self.w_1 = nn.ParameterList([p["up"].clone() for p in w["layers"]])
        self.w_2 = nn.ParameterList([p["down"].clone() for p in w["layers"]])

    def forward(self, src: Tensor) -> Tensor:
        mask = torch.triu(torch.ones((1, src.size(1), src.size(1))), diagonal=1).type(torch.uint8) == 0
        x = self.lut[src] + self.pe[: src.size(1)]
        for n, attn in enumerate(self.self_attn):
            x = self.sublayer[2 * n](x, lambda x, attn=attn: attn(x, x, x, mask))
            x = self.sublayer[2 * n + 1](x, lambda x, n=n: (x @ self.w_1[n]).relu() @ self.w_2[n])
        return x @ self.lut.t()


# The fifth hand: plain functions on plain matrices, one sequence and one head at a time, nothing of torch.nn.


def softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - x.max(dim=-1, keepdim=True).values)
    return e / e.sum(dim=-1, keepdim=True)


def norm(x: Tensor, g: Tensor) -> Tensor:
    return g * (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, correction=0) + 1e-5)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:  # [n, d], [n, d], [n, d], [n, n] -> [n, d]
    return softmax(q @ k.T / math.sqrt(q.shape[-1]) + mask) @ v


def mha(x: Tensor, p: Any) -> Tensor:
    qkv = [torch.split(x @ p[n] + p[f"{n}_bias"], WIDTH // HEADS, dim=-1) for n in "qkv"]
    causal_mask = (1 - torch.tril(torch.ones(x.shape[0], x.shape[0]))) * -1e10
    out_heads = [attend(q, k, v, causal_mask) for q, k, v in zip(*qkv, strict=True)]
    return torch.hstack(out_heads) @ p["o"] + p["o_bias"]


class PlainFunctions(nn.Module):
    def __init__(self, w: Weights):
        super().__init__()
        self.wte, self.wpe = nn.Parameter(w["tokens"].clone()), nn.Parameter(w["positions"].clone())
        self.blocks = nn.ModuleList(nn.ParameterDict({k: v.clone() for k, v in p.items()}) for p in w["layers"])

    def one(self, ids: Tensor) -> Tensor:
        x = self.wte[ids] + self.wpe[range(len(ids))]
        for p in self.blocks:
            x = x + mha(norm(x, p["norm1"]), p)
            x = x + torch.relu(norm(x, p["norm2"]) @ p["up"]) @ p["down"]
        return x @ self.wte.T

    def forward(self, batch: Tensor) -> Tensor:
        return torch.stack([self.one(ids) for ids in batch])
