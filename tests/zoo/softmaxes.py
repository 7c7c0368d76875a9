"""From scores to weights and on to the values: softmax by hand, sinks, soft caps, dropout, in-place steps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import causal, heads
from tests.zoo.base import B, D, E, Entry, Expected, H, T, zoo


class Plain(Entry):
    """Causal self-attention whose subclasses say how scores become weights, and weights the output."""

    out = "proj"
    masked = True

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def weigh(self, scores: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * D**-0.5
        if self.masked:
            scores = scores.masked_fill(~causal(T), -math.inf)
        return self.proj((self.weigh(scores) @ v).transpose(1, 2).reshape(B, T, E))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = (heads(part, H) for part in self.qkv(x).chunk(3, dim=-1))
        return Expected(q, k, v, scale=D**-0.5, mask=causal(T) if self.masked else None)


@zoo("softmax_method")
class Method(Plain):
    def weigh(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)


@zoo("softmax_module_per_call")
class ModulePerCall(Plain):
    def weigh(self, scores: Tensor) -> Tensor:
        return nn.Softmax(-1)(scores)


@zoo("softmax_float32_argument", tol=1e-5)
class Float32Argument(Plain):
    def weigh(self, scores: Tensor) -> Tensor:
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


@zoo("softmax_exp_over_sum")
class ExpOverSum(Plain):
    def weigh(self, scores: Tensor) -> Tensor:
        e = torch.exp(scores)
        return e / e.sum(dim=-1, keepdim=True)


@zoo("softmax_exp_minus_max")
class ExpMinusMax(Plain):
    def weigh(self, scores: Tensor) -> Tensor:
        e = torch.exp(scores - torch.max(scores, dim=-1, keepdim=True)[0])
        return e / torch.sum(e, -1, True)


@zoo("softmax_exp_in_place")
class ExpInPlace(Plain):
    """Not one new tensor between the scores and the weights."""

    def weigh(self, scores: Tensor) -> Tensor:
        scores -= scores.amax(-1, keepdim=True)
        scores.exp_()
        scores /= scores.sum(-1, keepdim=True)
        return scores


@zoo("softmax_exp_times_mask")
class ExpTimesMask(Plain):
    """The mask multiplies the exponentials, and is seen nowhere else."""

    masked = False

    def weigh(self, scores: Tensor) -> Tensor:
        e = (scores - scores.detach().max()).exp() * causal(T).to(scores.dtype)
        return e / e.sum(-1, keepdim=True)

    def expected(self, x: Tensor) -> Expected:
        expected = super().expected(x)
        expected.mask = causal(T)
        return expected


@zoo("softmax_logsumexp")
class LogSumExp(Plain):
    def weigh(self, scores: Tensor) -> Tensor:
        return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True))


@zoo("softmax_log_softmax_exp")
class LogSoftmaxExp(Plain):
    def weigh(self, scores: Tensor) -> Tensor:
        return F.log_softmax(scores, dim=-1).exp()


@zoo("softmax_plus_one")
class SoftmaxPlusOne(Plain):
    """exp(x) / (1 + sum(exp(x))): a sink whose logit is 0."""

    def weigh(self, scores: Tensor) -> Tensor:
        top = scores.amax(dim=-1, keepdim=True).clamp(min=0)
        e = torch.exp(scores - top)
        return e / (torch.exp(-top) + e.sum(dim=-1, keepdim=True))

    def expected(self, x: Tensor) -> Expected:
        expected = super().expected(x)
        expected.sinks = torch.zeros(H, dtype=x.dtype)
        return expected


@zoo("softmax_plus_one_plain")
class SoftmaxPlusOnePlain(SoftmaxPlusOne):
    def weigh(self, scores: Tensor) -> Tensor:
        return scores.exp() / (1 + scores.exp().sum(-1, keepdim=True))


@zoo("sink_column_last")
class SinkLast(Plain):
    """gpt-oss: the learned logit is the last column, dropped after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.linspace(-1.0, 1.5, H))

    def weigh(self, scores: Tensor) -> Tensor:
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[-2], -1)
        combined_logits = torch.cat([scores, sinks], dim=-1)
        combined_logits = combined_logits - combined_logits.max(dim=-1, keepdim=True).values
        probs = F.softmax(combined_logits, dim=-1, dtype=combined_logits.dtype)
        return probs[..., :-1]

    def expected(self, x: Tensor) -> Expected:
        expected = super().expected(x)
        expected.sinks = self.sinks
        return expected


@zoo("sink_column_first")
class SinkFirst(SinkLast):
    def weigh(self, scores: Tensor) -> Tensor:
        sinks = self.sinks[None, :, None, None].expand(B, H, T, 1)
        return torch.softmax(torch.cat((sinks, scores), dim=3), dim=3)[:, :, :, 1:]


@zoo("softcap_gemma", tol=1e-5)
class Softcap(Entry):
    """scores / cap, tanh, * cap, before a sliced additive mask and a float32 softmax."""

    out = "o_proj"

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(E, E), nn.Linear(E, E), nn.Linear(E, E)
        self.o_proj = nn.Linear(E, E)
        self.scaling, self.softcap = 0.9, 2.0

    def forward(self, hidden_states: Tensor) -> Tensor:
        shape = (B, -1, H, D)
        query, key, value = (
            p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention_mask = torch.full((1, 1, T, T + 3), torch.finfo(query.dtype).min, dtype=query.dtype).triu(1)
        attn_weights = torch.matmul(query, key.transpose(2, 3)) * self.scaling
        attn_weights = attn_weights / self.softcap
        attn_weights = torch.tanh(attn_weights)
        attn_weights = attn_weights * self.softcap
        attn_weights = attn_weights + attention_mask[:, :, :, : key.shape[-2]]
        attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
        attn_weights = nn.functional.dropout(attn_weights, p=0.0, training=self.training)
        attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()
        return self.o_proj(attn_output.reshape(B, T, -1))

    def expected(self, x: Tensor) -> Expected:
        q, k, v = (heads(proj(x), H) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return Expected(q, k, v, scale=self.scaling, softcap=self.softcap, mask=causal(T))


@zoo("softcap_before_scale_is_folded")
class SoftcapTanhMethod(Plain):
    """cap * tanh(scores / cap) in one line, as Grok's code has it."""

    def weigh(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        logits = torch.einsum("bhtd,bhsd->bhts", q, k) * 0.7
        logits = 3.0 * (logits / 3.0).tanh()
        logits = torch.where(causal(T), logits, torch.tensor(-1e30, dtype=logits.dtype))
        return self.proj(torch.einsum("bhts,bhsd->bthd", self.weigh(logits), v).reshape(B, T, E))

    def expected(self, x: Tensor) -> Expected:
        expected = super().expected(x)
        expected.scale, expected.softcap = 0.7, 3.0
        return expected


class WithDropout(Plain):
    p = 0.4

    def expected(self, x: Tensor) -> Expected:
        expected = super().expected(x)
        expected.dropout = self.p
        return expected


@zoo("dropout_functional_train", train=True)
class FunctionalDropout(WithDropout):
    def weigh(self, scores: Tensor) -> Tensor:
        return F.dropout(torch.softmax(scores, -1), p=self.p, training=self.training)


@zoo("dropout_in_place_train", train=True)
class InPlaceDropout(WithDropout):
    """The weights themselves are overwritten."""

    def weigh(self, scores: Tensor) -> Tensor:
        weights = torch.softmax(scores, -1)
        return F.dropout(weights, self.p, self.training, inplace=True)


@zoo("dropout_module_in_place_train", train=True)
class ModuleInPlaceDropout(WithDropout):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(self.p, inplace=True)

    def weigh(self, scores: Tensor) -> Tensor:
        weights = scores.softmax(dim=-1)
        self.drop(weights)
        return weights


@zoo("overwritten_afterwards")
class OverwrittenAfterwards(Plain):
    """q, the weights and the kernel's output are all overwritten in place later on."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.contiguous() for part in self.qkv(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4))
        scores = q @ k.mT
        scores *= D**-0.5
        weights = scores.masked_fill_(~causal(T), -math.inf).softmax(-1)
        scores.zero_()
        y = weights @ v
        weights.zero_()
        q.zero_()
        k.fill_(7.0)
        v.neg_()
        y.mul_(2.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, E))

    def finish(self, outputs: list[Tensor], x: Tensor) -> Tensor:
        return self.proj((2.0 * outputs[0]).transpose(1, 2).reshape(B, T, E))
