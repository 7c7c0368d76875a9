"""Where a tensor's memory is, and how often it was written to.

``data_ptr()`` is public and not asked: it is 0 for every tensor without values, and it gives a tensor that shares its
memory with a lazy copy a memory of its own, since whoever has an address may write to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .private import missing, private

_storage_address: Callable[[Tensor], int] = private("torch._C", "_data_address", "reads of a tensor's memory")


def _check() -> None:
    """Say what this torch lacks, where an AttributeError came up."""
    x = torch.empty(0)
    if not hasattr(x, "_version"):
        missing("torch.Tensor._version", "checks for writes to a tensor")()
    if not hasattr(x.untyped_storage(), "_cdata"):
        missing("torch.UntypedStorage._cdata", "comparisons of tensors' memory")()


def version_of(x: Tensor) -> int:
    """How often a tensor was written to; −1 where nobody counts."""
    try:
        return -1 if x.is_inference() else x._version
    except AttributeError:
        _check()
        raise


def storage_of(x: Tensor) -> int:
    """A number that tells a tensor's storage from others', for as long as it lives; 0 if it has none."""
    try:
        found: int = x.untyped_storage()._cdata
        return found
    except AttributeError:
        _check()
        raise
    except (RuntimeError, NotImplementedError):  # a wrapper without memory of its own (vmap)
        return 0


def address_of(x: Tensor) -> int:
    """Where the first element of a tensor is, for who only reads it; 0 for one without values or memory of its own."""
    try:
        found = _storage_address(x)
    except (RuntimeError, NotImplementedError):  # as in storage_of
        return 0
    return found and found + int(x.storage_offset()) * x.element_size()
