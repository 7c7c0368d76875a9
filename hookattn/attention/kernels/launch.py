"""Starts the GPU kernels of scores, weights and certificates; or says why torch's own operations have to do.

What all kernels have in common stands here, too: what they are given, how they are cut up into tiles, and what becomes
of one that cannot be built.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...torch_internals.devices import made_current
from ..functional import dot_scores, sink_column
from ..kernel_call import KernelCall
from ..masks import Diagonal

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Wider heads are multiplied by torch: their tiles leave no room in a processor's shared memory.
WIDEST = 256


class Tile(NamedTuple):
    """How a kernel is cut up for the GPU.

    Attributes:
        rows: of a tile.
        columns: of a tile; a program goes over the columns tile by tile.
        warps: of a program, 32 threads each.
        stages: of the pipeline that loads tiles ahead.
        registers: the most a thread may have; None: as many as the compiler likes.
    """

    rows: int
    columns: int
    warps: int
    stages: int = 2
    registers: int | None = None

    def options(self) -> dict[str, Any]:
        """By the names of the kernels' parameters and Triton's options."""
        names = "BM", "BN", "num_warps", "num_stages", "maxnreg"
        return {name: value for name, value in zip(names, self, strict=True) if value is not None}


# For a check: few rows, of which no more are wanted.
_CHECK = Tile(16, 64, 4)
# What could not be built or started, by the key of :func:`start_refusal`, and why: compiling takes seconds, and would
# fail again in every layer.
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
    rows: Tensor | None,
    want_scores: bool,
    want_weights: bool,
) -> tuple[Tensor | None, Tensor | None] | str:
    """Scores (float32) and weights (in the dtype of ``q``) of one call, each written once, with no copy beside them.

    float16 and bfloat16 are multiplied in the kernel, on the tensor cores, where products are exact and sums float32.
    float32 has no such cores that keep its precision: torch forms the product where the result will be, as the plain
    functions do, and the kernel does the rest.

    Args:
        diagonal: what the mask consists of, if that says all; then ``mask`` isn't read.
        rows: T, which queries of the whole call these are, for ``diagonal``; None: all.
        q, k, scale, softcap, bias, mask, sinks, want_scores, want_weights: see :func:`hookattn.attention.derive`.

    Returns:
        B H T S each, or None; or a text: why no kernel takes this call.
    """
    (b, h, t, d), s = q.shape, k.shape[2]
    key = "derive", q.device, q.dtype, k.dtype, d
    reason = refusal(key, q)
    if reason is not None:
        return reason
    scores = q.new_empty(b, h, t, s, dtype=torch.float32) if want_scores else None
    weights = q.new_empty(b, h, t, s) if want_weights else None
    product = None
    if not _kernel_multiplies(q, k):
        whole = weights if weights is not None and weights.dtype == torch.float32 else None
        product = dot_scores(q, k, 1.0 if isinstance(scale, Tensor) else scale, scores if scores is not None else whole)
    tile = _tile_of(t, d, product is not None)

    def launch() -> None:
        kernels().derive_rows[(-(-t // tile.rows) * b * h,)](
            product=product, scores=scores, weights=weights, T=t, **tile.options(),
            **operands(q, k, scale, softcap, bias, None if diagonal else mask, sinks, diagonal or Diagonal(), rows),
        )  # fmt: skip

    return start_refusal(key, q, launch) or (scores, weights)


def check(
    call: KernelCall, checked: slice, mask: Tensor | None, diagonal: Diagonal | None, rows: Tensor | None = None
) -> Tensor | None:
    """What some rows of a call, derived from its arguments, give, against its output: in one sweep, nothing written.

    Args:
        call: one whose kernel formed neither scores nor weights, in a 16-bit dtype.
        checked: the query rows that are checked.
        mask, diagonal, rows: as in :func:`derive`.

    Returns:
        4, B·H, float32: for each batch entry and head the largest excess of a row sum over 1, the largest score, the
        largest error of the output and the largest value, of the rows that are checked and the keys that they see; or
        None: no kernel takes this call.
    """
    q, k, v, output = call.q, call.k, call.v, call.output
    if output is None or not (call.weights is call.applied is call.undropped is call.outer_error is None):
        return None
    (b, h, t, d), (s, e) = q.shape, v.shape[2:]
    key = "check", q.device, q.dtype, d, e
    if refusal(key, q) or not _kernel_multiplies(q, k) or v.dtype != q.dtype or e > WIDEST:
        return None
    n, tile = len(range(*checked.indices(t))), _CHECK
    blocks = -(-n // tile.rows)
    found = torch.empty(4, blocks, b * h, dtype=torch.float32, device=q.device)
    v = v.expand(b, -1, s, e)
    # Where the diagonal says all of the mask, the mask need not be read: T·S bytes less.
    terms = call.scale, call.softcap, call.bias, None if diagonal else mask, call.sinks

    def launch() -> None:
        kernels().check_rows[(blocks * b * h,)](
            v=v, output=output, found=found, start=checked.indices(t)[0], step=checked.indices(t)[2], N=n, E=e,
            BE=next_power_of_2(e), **tile.options(), **strides("v", v, "bgse"),
            **strides("out", output, "bhte"), **operands(q, k, *terms, diagonal or Diagonal(), rows),
        )  # fmt: skip

    if start_refusal(key, q, launch) is not None:
        return None
    return found[:, 0] if blocks == 1 else found.amax(1)


def kernels() -> Any:
    """The modules in Triton's language, as one; imported here, as Triton is heavy and may be missing."""
    from . import checking, receiving, rows, summing

    return SimpleNamespace(
        derive_rows=rows.derive_rows,
        check_rows=checking.check_rows,
        sum_rows=summing.sum_rows,
        receive_keys=receiving.receive_keys,
    )


def operands(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    softcap: float | None,
    bias: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    diagonal: Diagonal,
    rows: Tensor | None,
) -> dict[str, Any]:
    """What all kernels are given, by the names of their parameters; ``mask``: bool, beside ``diagonal``."""
    (b, h, t, d), (g, s) = q.shape, k.shape[1:3]
    k = k.expand(b, -1, -1, -1)
    beside = {
        "scale": scale if isinstance(scale, Tensor) else None,
        "bias": bias,
        "mask": None if mask is None else mask.view(torch.uint8),
    }
    wide = {name: None if x is None else x.expand(b, h, t, s) for name, x in beside.items()}
    column = None if sinks is None else sink_column(sinks).expand(b, h, t, 1)
    return {
        "q": q,
        "k": k,
        **wide,
        "sinks": column,
        "rows": None if rows is None else rows.contiguous(),
        "factor": 1.0 if isinstance(scale, Tensor) else float(scale),
        "softcap": softcap,
        **diagonal.kernel_operands(),
        "enable_fp_fusion": True,  # a product and a sum in one instruction, also where a release's default is otherwise
        **{"H": h, "per": h // g, "S": s, "D": d, "BD": next_power_of_2(d)},
        **strides("q", q, "bhtd"),
        **strides("k", k, "bgsd"),
        **strides("sinks", column, "bht"),
        **{key: n for name, x in wide.items() for key, n in strides(name, x, "bhts").items()},
    }


def start_refusal(key: tuple[Any, ...], q: Tensor, launch: Callable[[], None]) -> str | None:
    """Start a kernel: None; or the reason why that can't be, now and from now on for this ``key``."""
    try:
        with made_current(q):
            launch()
    except Exception as error:  # noqa: BLE001 - compilers and drivers fail in many ways, and the plain functions do not
        text = str(error).strip().partition("\n")[0]
        _refused[key] = f"the kernel could not be built or started here: {type(error).__name__}: {text}"
    return _refused.get(key)


def refusal(key: tuple[Any, ...], q: Tensor) -> str | None:
    """Why no kernel takes this tensor; ``key``: which kernel of what kind it would be, as in :func:`start_refusal`."""
    if key in _refused:
        return _refused[key]
    if type(q) is not Tensor:
        return f"no kernel takes a {type(q).__name__}"
    if q.dtype not in _DTYPES:
        return f"no kernel takes {str(q.dtype).removeprefix('torch.')}"
    return None if _has_triton() else "triton is not installed"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _kernel_multiplies(q: Tensor, k: Tensor) -> bool:
    """Whether q·k is left to the kernel."""
    return q.dtype == k.dtype != torch.float32 and q.shape[3] <= WIDEST


def _tile_of(t: int, d: int, formed: bool) -> Tile:
    """The tile of :func:`derive`.

    Args:
        t: queries.
        d: how wide they are.
        formed: whether torch has formed the product.
    """
    if formed:
        return Tile(4, 1024, 8)  # nothing but memory to be read and written in its order
    # Three of the larger ones fit on a processor: some write while others multiply.
    return Tile(16, 128, 4) if t <= 16 else Tile(64, 64, 4)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is no less than ``n``, and 16 at least: tensor cores multiply no less.

    Triton's ranges have powers of 2 for their lengths; what is beyond ``n`` is masked when it is loaded.
    """
    return max(16, 1 << (n - 1).bit_length())


def strides(name: str, x: Tensor | None, letters: str) -> dict[str, int]:
    """Strides by the names of a kernel's parameters; 0, which nobody reads, where there is no tensor."""
    return {f"{name}_{letter}": 0 if x is None else x.stride(i) for i, letter in enumerate(letters)}
