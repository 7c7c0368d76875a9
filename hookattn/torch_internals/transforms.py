"""Tensors inside ``torch.vmap`` and ``functionalize``: stand-ins that have no memory of their own."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .private import private

_is_batched: Callable[[Tensor], bool] = private("torch._C._functorch", "is_batchedtensor", "looks into torch.vmap")
_is_functional: Callable[[Tensor], bool] = private(
    "torch._C._functorch", "is_functionaltensor", "looks into functionalize"
)


def stands_for_others(x: Tensor) -> bool:
    """Whether a tensor is one of several at once, or a plan of one: it is gone when the transform ends."""
    return _is_batched(x) or _is_functional(x)
