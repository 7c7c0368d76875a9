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
from .tensor_identity import address_of, version_of

_lazy_clone: Callable[[Tensor], Tensor] | None = getattr(torch, "_lazy_clone", None)
_transforms_active: Callable[[], bool] = private(
    "torch._C", "_are_functorch_transforms_active", "copies of tensors inside vmap and its kin"
)

LAZY_COPIES = "COW.cpp"
"""What is in the message of an error that torch raises as it cannot write to memory that a lazy copy shares."""
SMALL = 1 << 15
"""Bytes of a tensor that is small."""


def snapshots(several: Sequence[Tensor], caches: Sequence[bool], copy: bool = False) -> list[Tensor]:
    """What several tensors are now; to be called without gradients, see :class:`~.isolation.isolated`.

    Lazy copies, and those of small tensors, keep the strides of what they are copies of; the others are contiguous.

    Real copies are made where torch refuses a lazy one, and where it would cost more than it saves:

    - of small tensors, which are copied in the time that it takes to ask all this;
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
    for x in several:
        if x.nbytes > SMALL or type(x) is not Tensor:
            break
    else:
        return [x.clone() for x in several]
    covered: dict[int, int] = {}
    storages: list[Any] = []
    for x in several:
        # A tensor of another class may have no storage of its own.
        storage = x.untyped_storage() if type(x) is Tensor else None
        storages.append(storage)
        if storage is not None:
            covered[storage._cdata] = covered.get(storage._cdata, 0) + _bytes(x)
    made: list[Tensor] = []
    for x, cache, storage in zip(several, caches, storages, strict=True):
        own = None
        if storage is not None and 2 * covered[storage._cdata] >= storage.nbytes() and not _outlives(x, cache):
            own = _lazily(x)
        made.append(allocation.copies([x])[0] if own is None else own)
    return made


class WriteWatch:
    """Tells whether a tensor was written to since this was made, by any operation, alias or view.

    A lazy copy is the witness: the first write parts the two. Where there can be none a real copy is, which takes a
    comparison each time.
    """

    __slots__ = ("_before", "_lazy", "_version")

    def __init__(self, x: Tensor):
        self._version = version_of(x)
        before = None if _outlives(x, True) else _lazily(x)
        self._lazy = before is not None
        self._before = x.clone() if before is None else before

    def written(self, x: Tensor) -> bool:
        """Whether it was.

        Args:
            x: the same tensor, or one that is the same elements of the same memory.
        """
        if version_of(x) != self._version:
            return True
        return address_of(x) != address_of(self._before) if self._lazy else not self._before.equal(x)


def is_lazy(x: Tensor) -> bool:
    """Whether a tensor may still share its memory with a copy that nobody has written to."""
    found: Callable[[Tensor], bool] = private("torch._C", "_is_cow_tensor", "looks at lazy copies")
    return found(x)


def _lazily(x: Tensor) -> Tensor | None:
    """A lazy copy of a tensor, where one can be made and follows all writes."""
    if _lazy_clone is None or type(x) is not Tensor or _transforms_active():
        return None
    if not x.untyped_storage().resizable():  # numpy made an array of it, which writes unseen, and must not lose it
        return None
    try:
        return _lazy_clone(x)
    except RuntimeError:  # memory that torch does not own: an array of numpy's, or shared between processes
        return None


def _outlives(x: Tensor, cache: bool) -> bool:
    """Whether the memory of a tensor outlives the call that it was recorded of."""
    if cache and not x.is_inference() and x._version > 0:
        return True
    return type(x) is nn.Parameter or (x._is_view() and type(x._base) is nn.Parameter)


def _bytes(x: Tensor) -> int:
    """How many bytes the elements of a tensor take, those that an expanded axis repeats once."""
    strides = x.stride()
    if 0 not in strides:
        return x.nbytes
    return x.element_size() * math.prod(n for n, stride in zip(x.shape, strides, strict=True) if stride)
