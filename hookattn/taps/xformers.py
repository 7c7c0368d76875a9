"""``xformers.ops.memory_efficient_attention`` and its forward-only forms; a bias object says itself what it hides."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..attention.kernel_call import KernelCall
from ..attention.masks import split_additive
from ..torch_internals.code_patching import Patch
from .active import current
from .base import Tap
from .packed_kernels import Kernel, Reading, UnreadableError, find
from .sdpa import split_mask

_KNOWN = frozenset({"attn_bias", "key", "op", "output_dtype", "p", "query", "scale", "value"})


def read(given: dict[str, Any], out: Tensor | None) -> Reading:
    """One call of the kernel in the contract's layout.

    Args:
        given: query: B T H D, B T D (one head) or B T G R D (R heads a group); key, value likewise with S.
        out: as query, with E; None: it has not run yet.
    """
    q, k, v = given["query"], given["key"], given["value"]
    if not k.is_floating_point():
        raise UnreadableError("quantized keys and values")
    scale, keys, values = given.get("scale"), _heads(k, True), _heads(v, True)
    if keys.shape[1] != values.shape[1]:
        keys, values = _heads(k), _heads(v)
    call = KernelCall(
        q=_heads(q),
        k=keys,
        v=values,
        output=None if out is None else _heads(out),
        tap="xformers",
        scale=float(scale) if scale is not None else q.shape[-1] ** -0.5,
        result=out,
        result_form=_heads,
    )
    if given.get("attn_bias") is not None:
        _hide(call, given["attn_bias"], q)
    return Reading(call, _back, {"q": ("query", _back), "k": ("key", _back), "v": ("value", _back)})


def _heads(x: Tensor, group: bool = False) -> Tensor:
    """B L D, B L H D or B L G R D -> B H L D; ``group``: heads that are there by broadcasting only once."""
    if x.dim() == 3:
        return x.unsqueeze(1)
    if x.dim() not in (4, 5):
        raise UnreadableError(f"{x.dim()} dimensions")
    if group and x.shape[-2] > 1 and x.stride(-2) == 0:
        x = x.narrow(-2, 0, 1)
    return x.flatten(2, -2).transpose(1, 2)


def _back(like: Tensor, x: Tensor) -> Tensor:
    """The way back of :func:`_heads`; a head that was there by broadcasting is so again.

    Args:
        like: B L D, B L H D or B L G R D.
        x: B H L D, or B G L D.
    """
    x = x.transpose(1, 2)
    if x.shape[2] == like.shape[2:-1].numel():
        return x.reshape(*like.shape[:-1], x.shape[-1])
    return x.reshape(*like.shape[:-2], 1, x.shape[-1]).expand(*like.shape[:-1], -1)


def _hide(call: KernelCall, bias: Any, q: Tensor) -> None:
    """Bias and mask of ``attn_bias``: a tensor, or an object that can become one, maybe itself posing as a tensor."""
    t, s = call.q.shape[2], call.k.shape[2]
    name = type(bias).__name__
    if not hasattr(bias, "materialize"):
        tracing = current()
        terms = split_additive(bias) if tracing is None else split_mask(tracing, bias)
    elif hasattr(bias, "block_tables"):
        raise UnreadableError(f"{name}: the keys are pages of a cache")
    else:
        terms = split_additive(bias.materialize((1, 1, t, s), dtype=torch.float32, device=call.q.device))
        call.notes.append(f"the mask is that of a {name}")
    call.bias, call.mask = (None if x is None else _as_bhts(x, q) for x in terms)
    if name.startswith("LowerTriangular"):
        call.causal, call.offset = True, s - t if "BottomRight" in name else 0
        call.window = getattr(bias, "_window_size", None)


def _as_bhts(x: Tensor, q: Tensor) -> Tensor:
    """A bias as B H T S.

    Args:
        x: T S, B T S, B·H T S, B H T S or B G R T S, each extent there or 1.
        q: the query, as it was given.
    """
    if x.dim() == 5:
        return x.expand(-1, q.shape[2], q.shape[3], -1, -1).flatten(1, 2)
    if x.dim() == 3:
        return x.unsqueeze(1) if x.shape[0] in (1, q.shape[0]) else x.reshape(q.shape[0], -1, *x.shape[1:])
    return x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))


KERNELS = {
    name: Kernel(read, _KNOWN, dropout="p")
    for name in (
        "memory_efficient_attention",
        "memory_efficient_attention_forward",
        "memory_efficient_attention_forward_requires_grad",
        "memory_efficient_attention_partial",
    )
}


def patches() -> Iterable[Patch]:
    """The functions, if xformers is loaded at all."""
    return find([sys.modules.get("xformers.ops.fmha"), sys.modules.get("xformers.ops")], KERNELS)


TAP = Tap("xformers", patches=patches)
