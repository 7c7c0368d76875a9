"""Where a tensor's memory is, and how often it was written to."""

from __future__ import annotations

from torch import Tensor


def version_of(x: Tensor) -> int:
    """How often a tensor was written to; −1 where nobody counts."""
    return -1 if x.is_inference() else x._version


def storage_of(x: Tensor) -> int:
    """What tells a tensor's memory from others': its address, or a number where it has no values; 0 if it has none."""
    try:
        storage = x.untyped_storage()
        return storage._cdata if storage.device.type == "meta" else storage.data_ptr()
    except (RuntimeError, NotImplementedError):  # a wrapper without memory of its own (vmap)
        return 0
