"""Copies that cost nothing until somebody writes: what a tensor is now, whoever writes to it later.

``torch._lazy_clone`` gives a tensor that shares its memory with another for as long as both are only read. The first
write through either, by any operation, alias or view, gives the written one a memory of its own. It takes a microsecond
whatever the size. Two things it cannot follow:

- a writer that holds a raw address from before (by way of DLPack, say; arrays that numpy made are known of);
- a storage that is resized before anybody writes to it, to whatever size, its own included (``x.resize_`` and ``out=``
  where they need more room, ``x.untyped_storage().resize_``): from torch 2.13 on, and not in 2.8, torch refuses the
  next write ("ctx != nullptr INTERNAL ASSERT FAILED at ... COW.cpp"), even when the copy is gone. What is recorded is
  right all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import allocation
from .private import private

_lazy_clone: Callable[[Tensor], Tensor] | None = getattr(torch, "_lazy_clone", None)
_transforms_active: Callable[[], bool] = private(
    "torch._C", "_are_functorch_transforms_active", "copies of tensors inside vmap and its kin"
)


def snapshots(several: Sequence[Tensor], caches: Sequence[bool], copy: bool = False) -> list[Tensor]:
    """What several tensors are now; to be called without gradients, see :class:`~.isolation.isolated`.

    Lazy copies keep the strides of what they are copies of; real ones are contiguous.

    Real copies are made where torch refuses a lazy one, and where it would cost more than it saves:

    - of a tensor of another class, or inside ``vmap`` and its kin;
    - of what covers less than half of its storage together with the others, as a later write would copy all of it;
    - of memory that outlives the call: a parameter's, and a cache's that was written to before, so that it will be
      again. Its address stays what it is, which a captured CUDA graph relies on, and it may be resized, which sharded
      training does with parameters;
    - of what numpy has made an array of, which writes without torch's knowing.

    Args:
        several: the tensors.
        caches: for each, whether it may be the memory of a cache.
        copy: make real copies of all.
    """
    if copy or _lazy_clone is None or _transforms_active():
        return allocation.copies(several)
    storages: list[Any] = []
    covered: dict[int, int] = {}
    for x in several:
        # A wrapper without a storage of its own has none to ask.
        storage = x.untyped_storage() if type(x) is Tensor else None
        storages.append(storage)
        if storage is not None:
            covered[storage._cdata] = covered.get(storage._cdata, 0) + _bytes(x)
    made: list[Tensor] = []
    for x, cache, storage in zip(several, caches, storages, strict=True):
        if (
            storage is None
            or 2 * covered[storage._cdata] < storage.nbytes()
            or not storage.resizable()  # numpy's arrays forbid that memory moves
            or (cache and _written(x))
            or (x._is_view() and type(x._base) is nn.Parameter)
        ):
            made += allocation.copies([x])
            continue
        try:
            made.append(_lazy_clone(x))
        except RuntimeError:  # memory that torch does not own: an array of numpy's, or shared between processes
            made += allocation.copies([x])
    return made


def _bytes(x: Tensor) -> int:
    """How many bytes the elements of a tensor take, those that an expanded axis repeats once."""
    strides = x.stride()
    if 0 not in strides:
        return x.nbytes
    return x.element_size() * math.prod(n for n, stride in zip(x.shape, strides, strict=True) if stride)


def _written(x: Tensor) -> bool:
    """Whether a tensor or one that shares its memory was written to in place, as far as torch counts it."""
    return not x.is_inference() and x._version > 0


def is_lazy(x: Tensor) -> bool:
    """Whether a tensor may still share its memory with a copy that nobody has written to."""
    found: Callable[[Tensor], bool] = private("torch._C", "_is_cow_tensor", "looks at lazy copies")
    return found(x)
