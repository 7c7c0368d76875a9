"""Heads in the batch, other axis orders, baddbmm: fairseq, Megatron, Bloom, image generators."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import alibi, causal, heads
from tests.zoo.base import B, D, E, Entry, Expected, H, S, T, zoo


@zoo("fairseq_time_first", ((T, B, E), (S, B, E)), tol=1e-5)
@zoo("fairseq_train", ((T, B, E), (S, B, E)), arguments={"dropout": 0.25}, train=True, tol=1e-5)
class FairseqMultiheadAttention(Entry):
    """T x B x E; heads folded by view and transpose; padding masked on a 4-D view; softmax in float32."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(E, E), nn.Linear(E, E), nn.Linear(E, E)
        self.out_proj = nn.Linear(E, E)
        self.p, self.scaling, self.head_dim = dropout, D**-0.5, D
        self.register_buffer("key_padding_mask", torch.zeros(B, S, dtype=torch.bool))
        self.key_padding_mask[1, -3:] = True

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        tgt_len, bsz, embed_dim = query.size()
        q = self.q_proj(query)
        k, v = self.k_proj(key), self.v_proj(key)
        q = q * self.scaling
        q = q.contiguous().view(tgt_len, bsz * H, self.head_dim).transpose(0, 1)
        k = k.contiguous().view(-1, bsz * H, self.head_dim).transpose(0, 1)
        v = v.contiguous().view(-1, bsz * H, self.head_dim).transpose(0, 1)
        src_len = k.size(1)
        attn_weights = torch.bmm(q, k.transpose(1, 2))
        attn_weights = attn_weights.view(bsz, H, tgt_len, src_len)
        attn_weights = attn_weights.masked_fill(self.key_padding_mask.unsqueeze(1).unsqueeze(2), float("-inf"))
        attn_weights = attn_weights.view(bsz * H, tgt_len, src_len)
        attn_weights_float = F.softmax(attn_weights, dim=-1, dtype=torch.float32)
        attn_weights = attn_weights_float.type_as(attn_weights)
        attn_probs = F.dropout(attn_weights, p=self.p, training=self.training)
        attn = torch.bmm(attn_probs, v)
        attn = attn.transpose(0, 1).contiguous().view(tgt_len, bsz, embed_dim)
        return self.out_proj(attn)

    def expected(self, query: Tensor, key: Tensor) -> Expected:
        def split(x: Tensor) -> Tensor:
            return x.view(x.shape[0], B, H, D).permute(1, 2, 0, 3)

        q = split(self.q_proj(query) * self.scaling)
        mask = ~self.key_padding_mask[:, None, None, :]
        return Expected(q, split(self.k_proj(key)), split(self.v_proj(key)), mask=mask, dropout=self.p)

    def finish(self, outputs: list[Tensor], *inputs: Tensor) -> Tensor:
        return self.out_proj(outputs[0].permute(2, 0, 1, 3).flatten(2))


@zoo("megatron_baddbmm_beta_0", ((T, B, E),))
class MegatronCoreAttention(Entry):
    """[sq, b, np, hn]; the product lands in an uninitialised buffer with beta=0; the mask is -10000, in place."""

    out = "dense"

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(E, 3 * E)
        self.dense = nn.Linear(E, E)
        self.norm_factor = math.sqrt(D)

    def forward(self, hidden_states: Tensor) -> Tensor:
        mixed_x_layer = self.query_key_value(hidden_states)
        mixed_x_layer = mixed_x_layer.view(*mixed_x_layer.size()[:-1], H, 3 * D)
        query_layer, key_layer, value_layer = torch.split(mixed_x_layer, D, dim=-1)
        sq, b, np_, hn = query_layer.size()
        sk = key_layer.size(0)
        query_layer = query_layer.reshape(sq, b * np_, -1)
        key_layer = key_layer.reshape(sk, b * np_, -1)
        matmul_input_buffer = torch.full((b * np_, sq, sk), float("nan"), dtype=query_layer.dtype)
        matmul_result = torch.baddbmm(
            matmul_input_buffer,
            query_layer.transpose(0, 1),
            key_layer.transpose(0, 1).transpose(1, 2),
            beta=0.0,
            alpha=(1.0 / self.norm_factor),
        )
        attention_scores = matmul_result.view(b, np_, sq, sk)
        attention_scores.masked_fill_(torch.ones(1, 1, sq, sk, dtype=torch.bool).triu(1), -10000.0)
        attention_probs = torch.nn.Softmax(dim=-1)(attention_scores)
        value_layer = value_layer.reshape(sk, b * np_, -1)
        attention_probs = attention_probs.view(b * np_, sq, sk)
        context_layer = torch.bmm(attention_probs, value_layer.transpose(0, 1))
        context_layer = context_layer.view(b, np_, sq, hn).permute(2, 0, 1, 3).contiguous()
        return self.dense(context_layer.view(sq, b, E))

    def expected(self, x: Tensor) -> Expected:
        mixed = self.query_key_value(x).view(T, B, H, 3, D)
        q, k, v = mixed.permute(3, 1, 2, 0, 4)
        return Expected(q, k, v, scale=1 / self.norm_factor, mask=causal(T))

    def finish(self, outputs: list[Tensor], *inputs: Tensor) -> Tensor:
        return self.dense(outputs[0].permute(2, 0, 1, 3).flatten(2))


@zoo("bloom_alibi_baddbmm_method", tol=1e-5)
class BloomAttention(Entry):
    """alibi.baddbmm(q, k, beta, alpha); the mask by masked_fill with the dtype's minimum."""

    out = "dense"

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.inv_norm_factor, self.beta = 1.0 / math.sqrt(D), 1.0
        slopes = torch.tensor([2.0 ** (-2 * (i + 1)) for i in range(H)])
        self.register_buffer("alibi", (slopes[:, None, None] * torch.arange(T)).repeat(B, 1, 1))

    def forward(self, hidden_states: Tensor) -> Tensor:
        fused_qkv = self.query_key_value(hidden_states).view(B, T, H, 3, D)
        query_layer, key_layer, value_layer = fused_qkv[..., 0, :], fused_qkv[..., 1, :], fused_qkv[..., 2, :]
        query_layer = query_layer.transpose(1, 2).reshape(B * H, T, D)
        key_layer = key_layer.permute(0, 2, 3, 1).reshape(B * H, D, T)
        value_layer = value_layer.transpose(1, 2).reshape(B * H, T, D)
        matmul_result = self.alibi.baddbmm(
            batch1=query_layer, batch2=key_layer, beta=self.beta, alpha=self.inv_norm_factor
        )
        attention_scores = matmul_result.view(B, H, T, T)
        attn_weights = torch.masked_fill(
            attention_scores, torch.ones(T, T, dtype=torch.bool).triu(1), torch.finfo(attention_scores.dtype).min
        )
        attention_probs = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(hidden_states.dtype)
        attention_probs_reshaped = attention_probs.view(B * H, T, T)
        context_layer = torch.bmm(attention_probs_reshaped, value_layer)
        context_layer = context_layer.view(B, H, T, D).permute(0, 2, 1, 3).reshape(B, T, E)
        return self.dense(context_layer)

    def expected(self, x: Tensor) -> Expected:
        q, k, v = self.query_key_value(x).view(B, T, H, 3, D).permute(3, 0, 2, 1, 4)
        bias = self.alibi.view(B, H, 1, T)
        return Expected(q, k, v, scale=self.inv_norm_factor, bias=bias, mask=causal(T))


@zoo("diffusion_qkv_channels_first", ((B, E, T),), tol=1e-5)
class QKVAttentionLegacy(Entry):
    """B C T throughout; the square root of the scale on both q and k; softmax of .float(), cast back."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj_out = nn.Conv1d(E, 3 * E, 1), nn.Conv1d(E, E, 1)
        self.n_heads = H

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        bs, width, length = qkv.shape
        ch = width // (3 * self.n_heads)
        q, k, v = qkv.reshape(bs * self.n_heads, ch * 3, length).split(ch, dim=1)
        scale = 1 / math.sqrt(math.sqrt(ch))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        a = torch.einsum("bts,bcs->bct", weight, v)
        return x + self.proj_out(a.reshape(bs, -1, length))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = self.qkv(x).view(B, H, 3, D, T).permute(2, 0, 1, 4, 3)
        scale = 1 / math.sqrt(math.sqrt(D))
        return Expected(q * scale, k * scale, v)

    def finish(self, outputs: list[Tensor], x: Tensor) -> Tensor:
        return x + self.proj_out(outputs[0].transpose(2, 3).reshape(B, E, T))


@zoo("vqgan_conv_attn_block", ((B, E, 2, 3),))
class AttnBlock(Entry):
    """Pixels as positions, 1x1 convolutions, values on the left of the transposed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, E)
        self.q, self.k, self.v = nn.Conv2d(E, E, 1), nn.Conv2d(E, E, 1), nn.Conv2d(E, E, 1)
        self.proj_out = nn.Conv2d(E, E, 1)

    def forward(self, x: Tensor) -> Tensor:
        h_ = self.norm(x)
        q, k, v = self.q(h_), self.k(h_), self.v(h_)
        b, c, h, w = q.shape
        q = q.reshape(b, c, h * w)
        q = q.permute(0, 2, 1)  # b,hw,c
        k = k.reshape(b, c, h * w)  # b,c,hw
        w_ = torch.bmm(q, k)  # b,hw,hw
        w_ = w_ * (int(c) ** (-0.5))
        w_ = torch.nn.functional.softmax(w_, dim=2)
        v = v.reshape(b, c, h * w)
        w_ = w_.permute(0, 2, 1)  # b,hw,hw (first hw of k, second of q)
        h_ = torch.bmm(v, w_)  # b,c,hw
        h_ = h_.reshape(b, c, h, w)
        return x + self.proj_out(h_)

    def expected(self, x: Tensor) -> Expected:
        y = self.norm(x)
        q, k, v = (conv(y).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        return Expected(q, k, v, scale=E**-0.5)

    def finish(self, outputs: list[Tensor], x: Tensor) -> Tensor:
        return x + self.proj_out(outputs[0].squeeze(1).transpose(1, 2).reshape(x.shape))


@zoo("sagan_no_scale", ((B, E, 2, 3),))
class SelfAttn(Entry):
    """No scale at all, q and k narrower than v, a learned gate on the result."""

    def __init__(self) -> None:
        super().__init__()
        self.query_conv, self.key_conv = nn.Conv2d(E, E // 2, 1), nn.Conv2d(E, E // 2, 1)
        self.value_conv = nn.Conv2d(E, E, 1)
        self.gamma = nn.Parameter(torch.full((1,), 0.5))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        m_batchsize, C, width, height = x.size()
        proj_query = self.query_conv(x).view(m_batchsize, -1, width * height).permute(0, 2, 1)
        proj_key = self.key_conv(x).view(m_batchsize, -1, width * height)
        energy = torch.bmm(proj_query, proj_key)
        attention = self.softmax(energy)
        proj_value = self.value_conv(x).view(m_batchsize, -1, width * height)
        out = torch.bmm(proj_value, attention.permute(0, 2, 1))
        return self.gamma * out.view(m_batchsize, C, width, height) + x

    def expected(self, x: Tensor) -> Expected:
        convs = (self.query_conv, self.key_conv, self.value_conv)
        q, k, v = (conv(x).flatten(2).transpose(1, 2).unsqueeze(1) for conv in convs)
        return Expected(q, k, v, scale=1.0)

    def finish(self, outputs: list[Tensor], x: Tensor) -> Tensor:
        return self.gamma * outputs[0].squeeze(1).transpose(1, 2).reshape(x.shape) + x


@zoo("alibi_folded_add")
class AlibiFolded(Entry):
    """MPT-like: heads in the batch by reshape of a permuted view, ALiBi repeated over the batch."""

    out = "out_proj"

    def __init__(self) -> None:
        super().__init__()
        self.Wqkv, self.out_proj = nn.Linear(E, 3 * E, bias=False), nn.Linear(E, E)
        self.register_buffer("slopes_distance", alibi(H, T, T))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.Wqkv(x).reshape(B, T, 3, H, D).permute(2, 0, 3, 1, 4).reshape(3, B * H, T, D)
        q, k, v = qkv[0], qkv[1], qkv[2]
        logits = q.mul(D**-0.5).bmm(k.mT)
        logits = logits + self.slopes_distance.expand(B, H, T, T).reshape(B * H, T, T)
        probs = logits.softmax(-1)
        return self.out_proj(probs.bmm(v).reshape(B, H, T, D).permute(0, 2, 1, 3).reshape(B, T, E))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = (heads(part, H) for part in self.Wqkv(x).chunk(3, dim=-1))
        return Expected(q * D**-0.5, k, v, bias=self.slopes_distance)
