"""Where a tensor's memory is, and how often it was written to.

``data_ptr()`` is public, and 0 for every tensor without values; autograd's counter of writes has no public name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .private import missing


def _check() -> None:
    """Say what this torch lacks, where an AttributeError came up."""
    x = torch.empty(0)
    if not hasattr(x, "_version"):
        missing("torch.Tensor._version", "checks for writes to a tensor")()
    if not hasattr(x.untyped_storage(), "_cdata"):
        missing("torch.UntypedStorage._cdata", "comparisons of tensors without values")()


def version_of(x: Tensor) -> int:
    """How often a tensor was written to; −1 where nobody counts."""
    try:
        return -1 if x.is_inference() else x._version
    except AttributeError:
        _check()
        raise


def storage_of(x: Tensor) -> int:
    """What tells a tensor's memory from others': its address, or a number where it has no values; 0 if it has none."""
    try:
        storage = x.untyped_storage()
        return storage._cdata if storage.device.type == "meta" else storage.data_ptr()
    except AttributeError:
        _check()
        raise
    except (RuntimeError, NotImplementedError):  # a wrapper without memory of its own (vmap)
        return 0
