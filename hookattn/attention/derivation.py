"""Scores and weights of one call, as far as they are wanted: block by block on a CPU, by one kernel on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..torch_internals import allocation, devices
from .functional import compute_dtype, dot_scores, finish_scores, in_graph, softmax_weights
from .masks import Diagonal

# How many scores make a block on the CPU: 4 MiB of float32, which stays in the cache from product to softmax.
_BLOCK = 1 << 20


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
    rows: Tensor | None = None,
    notes: list[str] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Scores and weights of one call, only what is wanted; on the CPU block by block, so that a block stays in cache,
    and on a GPU by one kernel.

    Shapes and meaning as in :func:`dot_scores`, :func:`finish_scores` and :func:`softmax_weights`; the GPU's kernel
    writes the weights in the dtype of ``q``.

    Args:
        diagonal: what hides keys, where that is no mask but this alone: no mask has to be formed.
        rows: T, int64, which queries of the whole call these are, for ``diagonal``; None: all, in their order.
        notes: gets a line where a GPU's kernel does not take the call, and these functions do.
    """
    b, h, t, _ = q.shape
    g, s = k.shape[1], k.shape[2]
    # Whose gradients are asked for is made as a whole, by operations that have gradients.
    attached = in_graph(q, k, bias, sinks, scale if isinstance(scale, Tensor) else None)
    if devices.on_gpu(q) and b * h * t * s and not attached:
        from .kernels import derive as fused  # what it needs is heavy

        derived = fused(q, k, scale, softcap, bias, mask, sinks, diagonal, rows, want_scores, want_weights)
        if not isinstance(derived, str):
            return derived
        if notes is not None:
            notes.append(f"scores and weights were derived by torch's own operations: {derived}")
    elif notes is not None and not attached and (why := devices.plain_reason(q.device)):
        notes.append(f"scores and weights were derived by torch's own operations: {why}")
    # By blocks only where it pays: a call that fits into the cache needs none. Sinks and scales that are tensors are
    # rare, and left to the whole.
    simple = q.device.type == "cpu" and sinks is None and isinstance(scale, (int, float)) and k.shape[0] == b
    simple = simple and b * h * t * s > _BLOCK // 2 and not attached
    hides = diagonal is not None and diagonal.hides_any and mask is None
    numbers = (torch.arange(t, device=q.device) if rows is None else rows) if hides else None
    # A block's mask is added as −∞, which is quicker than choosing; to a score of +∞ that would give NaN. The sum of
    # q and k is finite only where both are; where it overflows, the safe way is taken for nothing.
    if not simple or not bool(torch.isfinite(q.sum() + k.sum())):
        whole = finish_scores(dot_scores(q, k, scale), softcap, bias)
        wanted = whole if want_scores else None
        if not want_weights:
            return wanted, None
        if diagonal is not None and numbers is not None:
            mask = diagonal.allows(numbers, slice(0, s))[None, None]
        return wanted, softmax_weights(whole, mask, sinks, empty)
    dtype = compute_dtype(q.dtype)
    scores = allocation.empty((b, h, t, s), dtype, q.device) if want_scores else None
    weights = allocation.empty((b, h, t, s), dtype, q.device) if want_weights else None
    first = scores if scores is not None else weights
    if first is None:
        return None, None
    heads_together, rows_together = _block_size(t, s, h // g)
    for start in range(0, t, rows_together):
        # Rows outermost, so that of a mask no more is formed than of the rows of one block.
        at = slice(start, min(start + rows_together, t))
        seen = None
        if diagonal is not None and numbers is not None:
            seen = diagonal.allows(numbers[at], slice(0, s))[None, None]
        elif mask is not None:
            seen = mask[:, :, at] if mask.shape[2] > 1 else mask
        hidden = blind = None
        if seen is not None and weights is not None:
            hidden = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
            blind = ~seen.any(-1, keepdim=True) if empty else None
        for i in range(b):
            for j in range(0, h, heads_together):
                heads = slice(j, min(j + heads_together, h))
                block = first[i, heads, at]
                # The query heads of one key head are rows of one product, so that k is not repeated.
                keys = k[i, heads.start * g // h : (heads.stop - 1) * g // h + 1].to(dtype)
                query = q[i, heads, at].to(dtype).reshape(keys.shape[0], -1, q.shape[3])
                flat = block.view(keys.shape[0], -1, s)  # all rows of some heads, or some rows of one: contiguous
                torch.baddbmm(flat, query, keys.transpose(1, 2), beta=0, alpha=float(scale), out=flat)
                finish_scores(block, softcap, None if bias is None else _part(bias, i, heads, at))
                if weights is not None:
                    out = weights[i, heads, at]
                    if hidden is not None:
                        block = torch.add(block, _part(hidden, i, heads), out=out)
                    torch.softmax(block, -1, out=out)
                    if blind is not None:
                        out.masked_fill_(_part(blind, i, heads), 0.0)
    return scores, weights


def _part(x: Tensor, i: int, heads: slice, at: slice = slice(None)) -> Tensor:
    """A block of what is broadcastable to B H T S."""
    every = slice(None)
    return x[i if x.shape[0] > 1 else 0, heads if x.shape[1] > 1 else every, at if x.shape[2] > 1 else every]


def _block_size(t: int, s: int, groups: int) -> tuple[int, int]:
    """How many heads and rows make at most a block of scores where a row is not more: as many whole groups of heads as
    go together, or else one head by rows."""
    heads = _BLOCK // max(1, groups * t * s) * groups
    return (heads, t) if heads else (1, max(16, _BLOCK // s))
