"""Tensors inside ``torch.vmap``, ``torch.func.grad`` and ``functionalize``: stand-ins, gone when these end.

One of ``vmap`` stands for several tensors at once, its examples. What they are is public in no way: a function that is
mapped shall not ask. A record has to, since it is read when the transform is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from torch import Tensor

from .private import private

_PIECE = "looks into torch.vmap and torch.func"
_is_batched: Callable[[Tensor], bool] = private("torch._C._functorch", "is_batchedtensor", _PIECE)
_is_functional: Callable[[Tensor], bool] = private("torch._C._functorch", "is_functionaltensor", _PIECE)
is_wrapped: Callable[[Tensor], bool] = private("torch._C._functorch", "is_functorch_wrapped_tensor", _PIECE)
_level: Callable[[Tensor], int] = private("torch._C._functorch", "maybe_get_level", _PIECE)
_examples_dim: Callable[[Tensor], int] = private("torch._C._functorch", "maybe_get_bdim", _PIECE)
_inner: Callable[[Tensor], Tensor] = private("torch._C._functorch", "get_unwrapped", _PIECE)
outside: Callable[[], AbstractContextManager[object]] = private(
    "torch._functorch.pyfunctorch", "temporarily_clear_interpreter_stack", _PIECE
)
"""Outside of all transforms for a while: what is done to plain tensors here makes plain tensors."""


def stands_for_others(x: Tensor) -> bool:
    """Whether a tensor is one of several at once, or a plan of one: it is gone when the transform ends."""
    if _is_functional(x):
        return True
    while is_wrapped(x):
        if _is_batched(x) or _is_functional(x):
            return True
        x = _inner(x)
    return False


def examples(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[int, ...]] | None:
    """The tensors that some stand for; to be called :func:`outside`.

    Returns:
        Each with a dimension in front for every ``vmap`` that any of them is in, the outermost first: of extent 1 where
        all examples have the same. And how many examples each has. None: they are a plan of ``functionalize``.
    """
    counts = dict[int, int]()
    places = dict[str, tuple[Tensor, dict[int, int], list[int]]]()
    for name, x in tensors.items():
        wrappers = list[tuple[int, int]]()
        while is_wrapped(x):
            if _is_functional(x):
                return None
            if _is_batched(x):
                wrappers.append((_level(x), _examples_dim(x)))
            x = _inner(x)
        # Each wrapper counts the dimensions that those in it have left: which those are of the plain tensor, from the
        # innermost on, is worked out here, as nothing can be done to a tensor that is in other transforms still.
        dims, of_level = list(range(x.dim())), dict[int, int]()
        for level, dim in reversed(wrappers):
            of_level[level] = dims.pop(dim)
            counts[level] = x.shape[of_level[level]]
        places[name] = x, of_level, dims
    levels = sorted(counts)
    found = dict[str, Tensor]()
    for name, (x, of_level, dims) in places.items():
        x = x.permute(*(of_level[level] for level in levels if level in of_level), *dims)
        for i, level in enumerate(levels):
            x = x if level in of_level else x.unsqueeze(i)
        found[name] = x
    return found, tuple(counts[level] for level in levels)
