"""Five GPTs in plain PyTorch, each as another researcher writes one.

No adapter knows these classes, and none of them calls a fused kernel, so a trace has to follow every operation. They
have little in common but their size: where heads stand, how scores are made and masked, and what a module is, differs
from hand to hand. Each takes token ids, B T, and returns logits, B T vocabulary; ``HANDS`` names them all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, einsum, nn

# Views and transposes: one map for q, k and v, a buffer of ones below the diagonal, masked_fill.


class CausalSelfAttention(nn.Module):
    """Heads are the second axis of q, k and v, B H T D."""

    def __init__(self, n_embd: int, n_head: int, block_size: int):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.1), nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(block_size, block_size))[None, None])

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class ViewsBlock(nn.Module):
    """Norms first, a GELU between the maps of the MLP."""

    def __init__(self, n_embd: int, n_head: int, block_size: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention(n_embd, n_head, block_size)
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ViewsGPT(nn.Module):
    """Learned positions; the head is the embedding's matrix."""

    def __init__(self, layers: int, width: int, heads: int, tokens: int, vocabulary: int):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(tokens, width),
                "h": nn.ModuleList(ViewsBlock(width, heads, tokens) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, idx: Tensor) -> Tensor:
        pos = torch.arange(idx.size(1), device=idx.device)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](pos)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


# Einsums: a map for each of q, k and v, axes by name, one key head for two query heads, a mask made in each forward.


class EinsumAttention(nn.Module):
    """Queries are scaled before the product; what may not be seen has the least number that there is."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        kv_heads = max(heads // 2, 1)
        self.heads, self.groups, self.scale = heads, heads // kv_heads, (dim // heads) ** -0.5
        self.norm = nn.LayerNorm(dim, bias=False)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim // self.groups, bias=False)
        self.to_v = nn.Linear(dim, dim // self.groups, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads) * self.scale
        k, v = (
            repeat(y, "b n (g d) -> b (g r) n d", g=self.heads // self.groups, r=self.groups)
            for y in (self.to_k(x), self.to_v(x))
        )
        sim = einsum("bhqd,bhkd->bhqk", q, k)
        n = sim.shape[-1]
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        attn = sim.masked_fill(causal, -torch.finfo(sim.dtype).max).softmax(dim=-1)
        out = einsum("bhqk,bhkd->bhqd", attn, v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class GatedFeedForward(nn.Module):
    """One half of the inner width gates the other."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, bias=False)
        self.project, self.to_out = nn.Linear(dim, 5 * dim, bias=False), nn.Linear(5 * dim // 2, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.project(self.norm(x)).chunk(2, dim=-1)
        return self.to_out(F.silu(gate) * x)


class EinsumGPT(nn.Module):
    """Pairs of layers in a list, learned positions."""

    def __init__(self, layers: int, width: int, heads: int, tokens: int, vocabulary: int):
        super().__init__()
        self.token_emb, self.pos_emb = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.layers = nn.ModuleList([])
        for _ in range(layers):
            self.layers.append(nn.ModuleList([EinsumAttention(width, heads), GatedFeedForward(width)]))
        self.to_logits = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_emb(ids) + rearrange(self.pos_emb[: ids.shape[-1]], "n d -> 1 n d")
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return self.to_logits(x)


# Heads folded into the batch: time first, bmm and baddbmm, the mask is what the product is added to.


class FoldedAttention(nn.Module):
    """Of T B C: heads and batch are one axis, B·H T D."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.k_proj, self.v_proj = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)
        self.q_proj, self.out_proj = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)

    def _fold(self, x: Tensor, bsz: int) -> Tensor:
        return x.contiguous().view(-1, bsz * self.num_heads, self.head_dim).transpose(0, 1)

    def forward(self, query: Tensor, attn_mask: Tensor) -> Tensor:
        tgt_len, bsz, embed_dim = query.size()
        q = self._fold(self.q_proj(query), bsz)
        k = self._fold(self.k_proj(query), bsz)
        v = self._fold(self.v_proj(query), bsz)
        attn_weights = torch.baddbmm(attn_mask, q, k.transpose(1, 2), alpha=self.scaling)
        attn_probs = F.softmax(attn_weights, dim=-1, dtype=torch.float32).type_as(attn_weights)
        attn = torch.bmm(attn_probs, v)
        return self.out_proj(attn.transpose(0, 1).contiguous().view(tgt_len, bsz, embed_dim))


class FoldedLayer(nn.Module):
    """Norms after each part; a ReLU."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.self_attn = FoldedAttention(embed_dim, num_heads)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.fc1, self.fc2 = nn.Linear(embed_dim, 4 * embed_dim), nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(x + self.self_attn(x, mask))
        return self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))


class FoldedGPT(nn.Module):
    """Positions are sines and cosines."""

    def __init__(self, layers: int, width: int, heads: int, tokens: int, vocabulary: int):
        super().__init__()
        self.embed_tokens, self.embed_scale = nn.Embedding(vocabulary, width), math.sqrt(width)
        angle = torch.arange(tokens)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        self.register_buffer("embed_positions", torch.stack((angle.sin(), angle.cos()), -1).view(tokens, 1, width))
        self.layers = nn.ModuleList([FoldedLayer(width, heads) for _ in range(layers)])
        self.output_projection = nn.Linear(width, vocabulary, bias=False)

    def forward(self, prev_output_tokens: Tensor) -> Tensor:
        length = prev_output_tokens.size(1)
        x = self.embed_tokens(prev_output_tokens).transpose(0, 1) * self.embed_scale + self.embed_positions[:length]
        mask = torch.triu(x.new_full((length, length), float("-inf")), 1)
        for layer in self.layers:
            x = layer(x, mask)
        return self.output_projection(x.transpose(0, 1))


# A loop over heads: each head is a module with three maps of its own, their results side by side.


class Head(nn.Module):
    """One head, B T C -> B T D."""

    def __init__(self, n_embd: int, head_size: int, block_size: int):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        k, q = self.key(x), self.query(x)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        wei = self.dropout(F.softmax(wei, dim=-1))
        return wei @ self.value(x)


class LoopBlock(nn.Module):
    """The heads one after the other, then the MLP."""

    def __init__(self, n_embd: int, n_head: int, block_size: int):
        super().__init__()
        self.heads = nn.ModuleList([Head(n_embd, n_embd // n_head, block_size) for _ in range(n_head)])
        self.proj, self.dropout = nn.Linear(n_embd, n_embd), nn.Dropout(0.2)
        self.ffwd = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd))
        self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        x = x + self.dropout(self.proj(torch.cat([h(y) for h in self.heads], dim=-1)))
        return x + self.ffwd(self.ln2(x))


class LoopGPT(nn.Module):
    """Two tables, a stack, a head."""

    def __init__(self, layers: int, width: int, heads: int, tokens: int, vocabulary: int):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocabulary, width)
        self.position_embedding_table = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*[LoopBlock(width, heads, tokens) for _ in range(layers)])
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, idx: Tensor) -> Tensor:
        tok_emb = self.token_embedding_table(idx)
        pos_emb = self.position_embedding_table(torch.arange(idx.shape[1], device=idx.device))
        return self.lm_head(self.ln_f(self.blocks(tok_emb + pos_emb)))


# One module: lists of matrices, rotary positions, norms and the softmax written out, a mask that is added.


class FlatGPT(nn.Module):
    """Every layer is an index; nothing but the whole model is a module."""

    def __init__(self, layers: int, width: int, heads: int, tokens: int, vocabulary: int):
        super().__init__()
        self.n_layers, self.n_heads, self.d_head = layers, heads, width // heads

        def matrices(*shape: int) -> nn.ParameterList:
            return nn.ParameterList([nn.Parameter(torch.randn(*shape) * shape[0] ** -0.5) for _ in range(layers)])

        def gains() -> nn.ParameterList:
            return nn.ParameterList([nn.Parameter(torch.ones(width)) for _ in range(layers)])

        self.emb = nn.Parameter(torch.randn(vocabulary, width) * 0.02)
        self.wq, self.wk, self.wv, self.wo = (matrices(width, width) for _ in range(4))
        self.w1, self.w2 = matrices(width, 4 * width), matrices(4 * width, width)
        self.g1, self.g2, self.gf = gains(), gains(), nn.Parameter(torch.ones(width))
        freq = 10000.0 ** (-torch.arange(0, self.d_head, 2).float() / self.d_head)
        angle = torch.outer(torch.arange(tokens).float(), torch.cat((freq, freq)))
        self.register_buffer("cos", angle.cos()[:, None])
        self.register_buffer("sin", angle.sin()[:, None])
        self.register_buffer("mask", torch.full((tokens, tokens), -1e9).triu(1))

    @staticmethod
    def rms(x: Tensor, g: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * g

    def rotate(self, x: Tensor) -> Tensor:  # b t h d
        a, b = x[..., : self.d_head // 2], x[..., self.d_head // 2 :]
        return x * self.cos[: x.shape[1]] + torch.cat((-b, a), -1) * self.sin[: x.shape[1]]

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        x = self.emb[ids]
        for i in range(self.n_layers):
            h = self.rms(x, self.g1[i])
            q = self.rotate((h @ self.wq[i]).reshape(b, t, self.n_heads, self.d_head)).permute(0, 2, 1, 3)
            k = self.rotate((h @ self.wk[i]).reshape(b, t, self.n_heads, self.d_head)).permute(0, 2, 3, 1)
            v = (h @ self.wv[i]).reshape(b, t, self.n_heads, self.d_head).permute(0, 2, 1, 3)
            s = torch.matmul(q, k) / self.d_head**0.5 + self.mask[:t, :t]
            p = (s - s.amax(-1, keepdim=True)).exp()
            p = p / p.sum(-1, keepdim=True)
            x = x + torch.matmul(p, v).permute(0, 2, 1, 3).reshape(b, t, -1) @ self.wo[i]
            x = x + F.gelu(self.rms(x, self.g2[i]) @ self.w1[i]) @ self.w2[i]
        return self.rms(x, self.gf) @ self.emb.T


LOOP = "a loop over heads"  # each head of which is an attention call
HANDS: dict[str, Any] = {
    "views": ViewsGPT,
    "einsum": EinsumGPT,
    "heads in the batch": FoldedGPT,
    LOOP: LoopGPT,
    "one module, rotary": FlatGPT,
}


def plain_gpt(
    hand: str, layers: int, width: int, heads: int, tokens: int, vocabulary: int, device: torch.device
) -> nn.Module:
    """The GPT of one of ``HANDS``, in eval mode, with random weights in float32."""
    torch.manual_seed(0)
    return HANDS[hand](layers, width, heads, tokens, vocabulary).to(device).eval()
