"""The math of a record: scores, mask and weights from a kernel's real arguments. Pure functions, no models, no state.

Letters: B batch, H query heads, G key/value heads (H = G·groups), T queries, S keys, D query/key width, E value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

# An additive entry at or below this is a mask, unless the tensor slopes down to it gradually (a long ALiBi bias).
MASKED = -9_000.0
# The smallest penalty in use as a mask: Swin's 0/-100, whose weights do reach 0.
FILL = -99.0
# What masks are made of beside -10000: float16's lowest, -1e9, the lowest of the others. A mask stands apart from the
# bias by at least a third of its size.
_BOUNDS = (MASKED, -60_000.0, -5e8, -1e30)
_APART = 1.5


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores are derived in: float32 for everything narrower, as fused kernels do inside."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def dot_scores(q: Tensor, k: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """``scale·q·kᵀ`` for grouped heads, without repeating ``k``.

    Args:
        q: B H T D.
        k: B G S D.
        scale: a float, or a tensor broadcastable to B H T S.

    Returns:
        B H T S in :func:`compute_dtype` of ``q``, freshly allocated.
    """
    dtype = compute_dtype(q.dtype)
    b, h, t, d = q.shape
    g, s = k.shape[1], k.shape[2]
    if k.shape[0] != b:
        k = k.expand(b, g, s, d)
    q, k = q.to(dtype), k.to(dtype)
    alpha = scale if isinstance(scale, (int, float)) else 1.0
    rows = (h // g) * t
    q3, k3 = q.reshape(b * g, rows, d), k.reshape(b * g, s, d)
    out = torch.baddbmm(q.new_empty(()), q3, k3.transpose(1, 2), beta=0, alpha=alpha).view(b, h, t, s)
    if isinstance(scale, Tensor):
        out.mul_(scale.to(dtype))
    return out


def finish_scores(scores: Tensor, softcap: float | None, bias: Tensor | None) -> Tensor:
    """Soft-cap (``c·tanh(s/c)``, Gemma 2) and bias, in place. ``scores``: B H T S."""
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores.add_(bias.to(scores.dtype))
    return scores


def softmax_weights(scores: Tensor, mask: Tensor | None, sinks: Tensor | None = None, empty: bool = True) -> Tensor:
    """Softmax over S of ``scores`` where ``mask``, else −inf; sinks join the denominator and are dropped.

    Args:
        scores: B H T S, left untouched.
        mask: bool, broadcastable to B H T S, True = may attend; None: all may.
        sinks: H, or broadcastable to B H T 1.
        empty: whether ``mask`` may have rows with nothing to attend to; they weigh 0.

    Returns:
        B H T S in the dtype of ``scores``.
    """
    masked = scores if mask is None else torch.where(mask, scores, -torch.inf)
    if sinks is None:
        weights = torch.softmax(masked, -1)
    else:
        sinks = sink_column(sinks).to(scores.dtype)
        total = torch.logaddexp(torch.logsumexp(masked, -1, keepdim=True), sinks)
        weights = torch.exp(masked - total)
    if empty and mask is not None:
        weights = weights.masked_fill_(~mask.any(-1, keepdim=True), 0.0)
    return weights


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


def causal_mask(
    t: int,
    s: int,
    *,
    window: int | None = None,
    offset: int = 0,
    causal: bool = True,
    device: torch.device | None = None,
) -> Tensor:
    """The bool mask of a causal or windowed kernel: 1 1 T S, True = may attend.

    Args:
        t: queries.
        s: keys.
        window: how many keys up to and including the query's own position it may see; None: no limit.
        offset: 0 aligns query 0 with key 0 (torch); ``s - t`` aligns the last query with the last key (flash-attn).
        causal: whether later keys are hidden; without it the window is two-sided.
        device: where the mask is made.
    """
    distance = torch.arange(t, device=device).view(t, 1) + offset - torch.arange(s, device=device)
    keep = distance >= 0 if causal else torch.ones((), dtype=torch.bool, device=device).expand(t, s)
    if window is not None:
        keep = keep & (distance < window)
        if not causal:
            keep = keep & (distance > -window)
    return keep.view(1, 1, t, s)


def split_additive(additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """An additive mask as (bias, mask): finite terms, and what may be attended to.

    −inf, ``finfo.min``, −10000 and their kin are masks, also where a bias was summed into the same tensor; so is a
    tensor that holds nothing but 0 and penalties of −99 or less (Swin's −100). A bias that slopes down gradually
    (ALiBi over a long context) stays a bias.

    Args:
        additive: floating, any shape.

    Returns:
        bias (finite, zero where masked; None if it is zero everywhere) and mask (bool; None if nothing is masked).
    """
    if additive.numel() == 0:
        return None, None
    low, top = (x.item() for x in torch.aminmax(additive))
    if low == 0 and top == 0:
        return None, None
    if low > FILL:
        return additive, None
    hidden, bias, floor = None, additive, low
    for bound in (b for b in _BOUNDS if low <= b):
        below = additive <= bound
        rest = torch.where(below, 0.0, additive)
        least, most = (x.item() for x in torch.aminmax(rest))
        if least > bound / _APART:  # no slope that leads down to it
            hidden, bias, floor, top = below, rest, least, most
            break
    if floor <= FILL and top == 0 and not bool(((bias < 0) & (bias > FILL)).any()):
        hidden, floor = additive != 0, 0.0
    return None if floor == 0 and top == 0 else bias, None if hidden is None else ~hidden
