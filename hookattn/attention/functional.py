"""The math of a record: scores, mask and weights from a kernel's real arguments. Pure functions, no models, no state.

Letters: B batch, H query heads, G key/value heads (H = G·groups), T queries, S keys, D query/key width, E value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..torch_internals import allocation

# An additive entry at or below this is a mask, unless the tensor slopes down to it gradually (a long ALiBi bias).
MASKED = -9_000.0
# The smallest penalty in use as a mask: Swin's 0/-100, whose weights do reach 0.
FILL = -99.0
# What masks are made of beside -10000: float16's lowest, -1e9, the lowest of the others. A mask stands apart from the
# bias by at least a third of its size.
_BOUNDS = (MASKED, -60_000.0, -5e8, -1e30)
_APART = 1.5
# How many scores make a block on the CPU: 4 MiB of float32, which stays in the cache from product to softmax.
_BLOCK = 1 << 20


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores are derived in: float32 for everything narrower, as fused kernels do inside."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


class Diagonal(NamedTuple):
    """What a causal or windowed kernel hides by itself.

    Attributes:
        causal, offset, window: see :func:`causal_mask`.
        rows: T, int64, which queries of the whole call these are; None: all, in their order.
    """

    causal: bool = False
    offset: int = 0
    window: int | None = None
    rows: Tensor | None = None


def on_gpu(q: Tensor) -> bool:
    """Whether a call is one for the kernels of :mod:`hookattn.attention.kernels`."""
    return q.is_cuda


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
    rows = (h // g) * t
    q3, k3 = q.reshape(b * g, rows, d), k.reshape(b * g, s, d)
    flat = None if out is None else out.view(b * g, rows, s)
    out = torch.baddbmm(q.new_empty(()), q3, k3.transpose(1, 2), beta=0, alpha=alpha, out=flat).view(b, h, t, s)
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


def derive(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor = 1.0,
    *,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    empty: bool = True,
    want_scores: bool = True,
    want_weights: bool = True,
    diagonal: Diagonal | None = None,
    notes: list[str] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Scores and weights of one call, only what is wanted; on the CPU block by block, so that a block stays in cache,
    and on a GPU by one kernel.

    Shapes and meaning as in :func:`dot_scores`, :func:`finish_scores` and :func:`softmax_weights`; the GPU's kernel
    writes the weights in the dtype of ``q``.

    Args:
        diagonal: what ``mask`` consists of, if that says all of it: a GPU then need not read it.
        notes: gets a line where a GPU's kernel does not take the call, and these functions do.
    """
    b, h, t, _ = q.shape
    g, s = k.shape[1], k.shape[2]
    if on_gpu(q) and b * h * t * s:
        from .kernels import derive as fused  # what it needs is heavy

        made = fused(q, k, scale, softcap, bias, mask, sinks, diagonal, want_scores, want_weights)
        if not isinstance(made, str):
            return made
        if notes is not None:
            notes.append(f"scores and weights were derived by torch's own operations: {made}")
    simple = q.device.type == "cpu" and sinks is None and isinstance(scale, (int, float)) and k.shape[0] == b
    simple = simple and b * h * t * s > _BLOCK // 2
    if not simple or not bool(torch.isfinite(q.sum() + k.sum())):  # −∞ is added below: to +∞ it would give NaN
        whole = finish_scores(dot_scores(q, k, scale), softcap, bias)
        return whole, softmax_weights(whole, mask, sinks, empty) if want_weights else None
    dtype = compute_dtype(q.dtype)
    scores = allocation.empty((b, h, t, s), dtype, q.device) if want_scores else None
    weights = allocation.empty((b, h, t, s), dtype, q.device) if want_weights else None
    first = scores if scores is not None else weights
    if first is None:
        return None, None
    hidden = None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
    for i, heads, at in _blocks(b, h, t, s, h // g):
        block = first[i, heads, at]
        keys = k[i, heads.start * g // h : (heads.stop - 1) * g // h + 1].to(dtype)
        query = q[i, heads, at].to(dtype).reshape(keys.shape[0], -1, q.shape[3])
        flat = block.view(keys.shape[0], -1, s)
        torch.baddbmm(flat, query, keys.transpose(1, 2), beta=0, alpha=float(scale), out=flat)
        finish_scores(block, softcap, None if bias is None else _part(bias, i, heads, at))
        if weights is not None:
            out = weights[i, heads, at]
            if hidden is not None:
                block = torch.add(block, _part(hidden, i, heads, at), out=out)
            torch.softmax(block, -1, out=out)
    if weights is not None and empty and mask is not None:
        weights.masked_fill_(~mask.any(-1, keepdim=True), 0.0)
    return scores, weights


def _part(x: Tensor, i: int, heads: slice, at: slice) -> Tensor:
    """A block of what is broadcastable to B H T S."""
    every = slice(None)
    return x[i if x.shape[0] > 1 else 0, heads if x.shape[1] > 1 else every, at if x.shape[2] > 1 else every]


def _blocks(b: int, h: int, t: int, s: int, groups: int) -> Iterator[tuple[int, slice, slice]]:
    """A batch entry, heads and rows of B H T S, of at most a block of scores where a row is not more: as many whole
    groups of heads as go together, or else one head by rows."""
    heads = _BLOCK // max(1, groups * t * s) * groups
    rows = t if heads else max(16, _BLOCK // s)
    for i in range(b):
        for j in range(0, h, heads or 1):
            for start in range(0, t, rows):
                yield i, slice(j, min(j + (heads or 1), h)), slice(start, min(start + rows, t))


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
