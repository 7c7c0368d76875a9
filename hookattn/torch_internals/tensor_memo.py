"""What is made of a tensor that many layers share, such as a mask: once, as long as nobody writes to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .tensor_identity import storage_of, version_of


class TensorMemo:
    """Remembers what was made of a tensor, until it is told to forget."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Tensor | None, Any, Tensor | None]] = {}
        self.forget = self._known.clear

    def __call__(self, key: Any, tensor: Tensor | None, make: Callable[[], Any]) -> Any:
        """What ``make`` returned when it was first called for this key and tensor, as it is now."""
        if tensor is not None:
            place = storage_of(tensor), tensor.storage_offset()
            key = (key, place, tuple(tensor.shape), tensor.stride(), tensor.dtype, version_of(tensor))
        known = self._known.get(key)
        if known is not None and tensor is not None and known[2] is not None and not known[2].equal(tensor):
            known = None  # written to since
        if known is None:
            before = tensor.clone() if tensor is not None and tensor.is_inference() else None  # it counts no writes
            known = self._known[key] = (tensor, make(), before)
        return known[1]
