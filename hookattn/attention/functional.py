"""The math of a record: scores, mask and weights from a kernel's real arguments. Pure functions, no models, no state.

Letters: B batch, H query heads, G key/value heads (H = G·groups), T queries, S keys, D query/key width, E value width.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores are derived in: float32 for everything narrower, as fused kernels do inside."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def dot_scores(q: Tensor, k: Tensor, scale: float | Tensor = 1.0, out: Tensor | None = None) -> Tensor:
    """``scale·q·kᵀ`` for grouped heads, without repeating ``k``.

    Args:
        q: B H T D.
        k: B G S D.
        scale: a float, or a tensor broadcastable to B H T S.
        out: where it is written, contiguous; None: freshly allocated.

    Returns:
        B H T S in :func:`compute_dtype` of ``q``.
    """
    dtype = compute_dtype(q.dtype)
    b, h, t, d = q.shape
    g, s = k.shape[1], k.shape[2]
    if k.shape[0] != b:
        k = k.expand(b, g, s, d)
    q, k = q.to(dtype), k.to(dtype)
    alpha = scale if isinstance(scale, (int, float)) else 1.0
    rows = (h // g) * t  # the query heads of one key head are rows of one product, so that k is not repeated
    q3, k3 = q.reshape(b * g, rows, d), k.reshape(b * g, s, d)
    flat = None if out is None else out.view(b * g, rows, s)
    # With beta=0 what is added is not read, and alpha scales in the same pass; bmm would need a second one.
    out = torch.baddbmm(q.new_empty(()), q3, k3.transpose(1, 2), beta=0, alpha=alpha, out=flat).view(b, h, t, s)
    if isinstance(scale, Tensor):
        out = out * scale.to(dtype) if in_graph(out, scale) else out.mul_(scale.to(dtype))
    return out


def finish_scores(scores: Tensor, softcap: float | None, bias: Tensor | None) -> Tensor:
    """Soft-cap (``c·tanh(s/c)``; Gemma Team 2024, Gemma 2) and bias, in place where no gradient needs what was there.
    ``scores``: B H T S."""
    if in_graph(scores, bias):
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        return scores if bias is None else scores + bias.to(scores.dtype)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores.add_(bias.to(scores.dtype))
    return scores


def softmax_weights(scores: Tensor, mask: Tensor | None, sinks: Tensor | None = None, empty: bool = True) -> Tensor:
    """Softmax over S of ``scores`` where ``mask``, else −inf; sinks join the denominator and are dropped.

    Sinks are learned logits that have no key (after Xiao et al. 2023, StreamingLLM).

    Args:
        scores: B H T S, left untouched.
        mask: bool, broadcastable to B H T S, True = may attend; None: all may.
        sinks: H, or broadcastable to B H T 1.
        empty: whether ``mask`` may have rows with nothing to attend to; they weigh 0.

    Returns:
        B H T S in the dtype of ``scores``.
    """
    # −∞ and not a large negative number: a hidden key weighs exactly 0. A row of nothing else is NaN, and set to 0
    # below.
    masked = scores if mask is None else torch.where(mask, scores, -torch.inf)
    if sinks is None:
        weights = torch.softmax(masked, -1)
    else:
        # exp s / (Σ exp s + exp sink): one more column in the denominator alone.
        sinks = sink_column(sinks).to(scores.dtype)
        total = torch.logaddexp(torch.logsumexp(masked, -1, keepdim=True), sinks)
        weights = torch.exp(masked - total)
    if empty and mask is not None:
        blind = ~mask.any(-1, keepdim=True)
        if in_graph(weights):
            # A row of nothing but −∞ has a gradient of NaN, whatever becomes of its weights: it is never made.
            masked = masked.masked_fill(blind, 0.0)
            return softmax_weights(masked, None, sinks, False).masked_fill(blind, 0.0)
        weights = weights.masked_fill_(blind, 0.0)
    return weights


def in_graph(*tensors: Tensor | None) -> bool:
    """Whether a gradient will be asked of what is made of some tensors: then nothing is written to in place."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def sink_column(sinks: Tensor) -> Tensor:
    """H, or broadcastable to B H T 1 -> broadcastable to B H T 1."""
    return sinks.view(1, -1, 1, 1) if sinks.dim() == 1 else sinks


def weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """``weights @ v`` for grouped heads: B H T S, B G S E -> B H T E."""
    b, h, t, s = weights.shape
    g, e = v.shape[1], v.shape[3]
    if v.shape[0] != b:
        v = v.expand(b, g, s, e)
    out = torch.bmm(weights.reshape(b * g, (h // g) * t, s), v.to(weights.dtype).reshape(b * g, s, e))
    return out.view(b, h, t, e)


@overload
def with_four_axes(x: Tensor) -> Tensor: ...


@overload
def with_four_axes(x: None) -> None: ...


@overload
def with_four_axes(x: Tensor | None) -> Tensor | None: ...


def with_four_axes(x: Tensor | None) -> Tensor | None:
    """B H T S from the right: ``x`` with axes of size 1 put before those it has, up to four."""
    return x if x is None or x.dim() == 4 else x[(None,) * (4 - x.dim())]
