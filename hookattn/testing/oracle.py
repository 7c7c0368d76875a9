"""Attention by its definition, in float64: what every recorded field is held to.

The conformance suite (:mod:`.invariants`) and ``hookattn verify`` (:mod:`.recheck`) share it. It shares nothing with
:mod:`hookattn.attention`, which it is there to check: the softmax is spelled out, and a sink is one more column.

Letters: B batch, H query heads, T queries, S keys, D query/key width, E value width; keys and values have one entry for
each query head here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def defined_scores(
    q: Tensor, k: Tensor, scale: float | Tensor, softcap: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """B H T S: scale·q·kᵀ, soft-capped, plus bias.

    Args:
        q: B H T D.
        k: B H S D.
        scale: a tensor is broadcastable to B H T S.
        softcap: ``c`` of ``c·tanh(s/c)``.
        bias: broadcastable to B H T S.
    """
    scores = q.double() @ k.double().mT * (scale.double() if isinstance(scale, Tensor) else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if bias is None else scores + bias.double()


def defined_weights(
    scores: Tensor, mask: Tensor | None, sinks: Tensor | None = None, normalizer: str = "softmax"
) -> Tensor:
    """B H T S: softmax over S where the mask allows; NaN in a row that has neither a key to attend to nor a sink.

    Args:
        scores: B H T S.
        mask: bool, broadcastable to B H T S.
        sinks: H, or broadcastable to B H T 1.
        normalizer: what makes weights of the scores, one of :data:`NORMALIZERS`.
    """
    joined = scores.double()
    if normalizer in _OF_EACH:
        weights = _OF_EACH[normalizer](joined)
        return weights if mask is None else torch.where(mask, weights, 0.0)
    if normalizer == "sparsemax":
        return _sparsemax(joined if mask is None else joined.masked_fill(~mask, -torch.inf))
    if normalizer == "softmax1" and sinks is None:
        sinks = torch.zeros(1, dtype=torch.float64, device=joined.device)
    if mask is not None:
        joined = joined.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        joined = torch.cat([joined, column(sinks).double().expand(*scores.shape[:3], 1)], -1)
    top = joined.amax(-1, keepdim=True)
    # A row that is hidden whole has no largest score, and −∞ less −∞ would be NaN where a sink is not.
    powers = torch.exp(joined - torch.where(top.isinf(), 0.0, top))
    return (powers / powers.sum(-1, keepdim=True))[..., : scores.shape[-1]]


def _sparsemax(scores: Tensor) -> Tensor:
    """The threshold that leaves a sum of 1 is between the largest score less 1 and itself, and found by halving."""
    high = scores.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(60):
        middle = (low + high) / 2
        less = (scores - middle).clamp_min(0).sum(-1, keepdim=True) < 1
        low, high = torch.where(less, low, middle), torch.where(less, middle, high)
    return (scores - low).clamp_min(0)


_OF_EACH: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "relu^2": lambda x: torch.where(x > 0, x * x, 0.0),
    "exp": torch.exp,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "none": lambda x: x,
}
SUM_TO_ONE = ("softmax", "softmax1", "sparsemax")
"""The normalizers whose rows sum to 1 (with sinks: to at most 1)."""
NORMALIZERS = (*SUM_TO_ONE, *_OF_EACH)
"""All that are defined here."""


def defined_output(weights: Tensor, v: Tensor) -> Tensor:
    """B H T E: weights @ v, of weights B H T S and v B H S E."""
    return weights.double() @ v.double()


def column(sinks: Tensor) -> Tensor:
    """Sinks with four axes: of one number for each head 1 H 1 1."""
    return sinks.view(1, -1, 1, 1) if sinks.dim() == 1 else sinks
