"""From a call's tensors to the GPU kernel; or to a reason why the plain functions have to do."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..attention import Diagonal, dot_scores, sink_column

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Wider heads are multiplied by torch: their tiles leave no room in a processor's shared memory.
_WIDEST = 256
_refused: dict[tuple[Any, ...], str] = {}


def derive(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    softcap: float | None,
    bias: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    diagonal: Diagonal | None,
    want_scores: bool,
    want_weights: bool,
) -> tuple[Tensor | None, Tensor | None] | str:
    """Scores (float32) and weights (in the dtype of ``q``) of one call, each written once, with no copy beside them.

    float16 and bfloat16 are multiplied in the kernel, on the tensor cores, where products are exact and sums float32.
    float32 has no such cores that keep its precision: torch forms the product where the result will be, as the plain
    functions do, and the kernel does the rest.

    Args:
        diagonal: what the mask consists of, if that says all; then ``mask`` isn't read.
        q, k, scale, softcap, bias, mask, sinks, want_scores, want_weights: see :func:`hookattn.attention.derive`.

    Returns:
        B H T S each, or None; or a text: why no kernel takes this call.
    """
    (b, h, t, d), (g, s) = q.shape, k.shape[1:3]
    key = q.device, q.dtype, k.dtype, d
    reason = _refused.get(key) or _problem(q)
    if reason is not None:
        return reason
    scores = q.new_empty(b, h, t, s, dtype=torch.float32) if want_scores else None
    weights = q.new_empty(b, h, t, s) if want_weights else None
    product = None
    if q.dtype == torch.float32 or k.dtype != q.dtype or d > _WIDEST:
        whole = weights if weights is not None and weights.dtype == torch.float32 else None
        product = dot_scores(q, k, 1.0 if isinstance(scale, Tensor) else scale, scores if scores is not None else whole)
    column = None if sinks is None else sink_column(sinks).expand(b, h, t, 1)
    factors, biases, allowed = (
        None if x is None else x.expand(b, h, t, s)
        for x in (
            scale if isinstance(scale, Tensor) else None,
            bias,
            None if mask is None or diagonal is not None else mask.view(torch.uint8),
        )
    )
    hides = diagonal or Diagonal()
    at = None if hides.rows is None else hides.rows.contiguous()
    try:
        rows = kernels()
        with torch.cuda.device(q.get_device()):  # on the CPU there is none to choose
            bm, bn, warps, stages = _tile(t, d, product is not None)
            rows.derive_rows[(-(-t // bm) * b * h,)](
                q, k.expand(b, g, s, d), product, scores, weights, factors, biases, allowed, column, at,
                1.0 if isinstance(scale, Tensor) else float(scale), softcap, hides.offset, hides.window or 0,
                h, h // g, t, s, d,
                *q.stride(), *k.expand(b, g, s, d).stride(), *_strides(factors), *_strides(biases), *_strides(allowed),
                *_strides(column)[:3],
                CAUSAL=hides.causal, WINDOWED=hides.window is not None,
                BM=bm, BN=bn, BD=max(16, 1 << (d - 1).bit_length()), num_warps=warps, num_stages=stages,
            )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - compilers and drivers fail in many ways, and the plain functions do not
        text = str(error).strip().partition("\n")[0]
        _refused[key] = reason = f"the kernel could not be built or started here: {type(error).__name__}: {text}"
        return reason
    return scores, weights


def kernels() -> Any:
    """The module in Triton's language; imported here, as Triton is heavy and may be missing."""
    from . import rows

    return rows


def _problem(q: Tensor) -> str | None:
    if type(q) is not Tensor:
        return f"no kernel takes a {type(q).__name__}"
    if q.dtype not in _DTYPES:
        return f"no kernel takes {str(q.dtype).removeprefix('torch.')}"
    return None if _has_triton() else "triton is not installed"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _tile(t: int, d: int, formed: bool) -> tuple[int, int, int, int]:
    """Rows and keys of a tile, warps, and stages of the pipeline."""
    if formed:
        return 4, 1024, 8, 2  # nothing but memory to be read and written in its order
    # Three of the larger ones fit on a processor: some write while others multiply.
    return (16, 128, 4, 2) if t <= 16 else (64, 64, 4, 2)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0,) * 4 if x is None else x.stride()
