"""What is made of a tensor that many layers share, such as a mask: once, as long as nobody writes to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .lazy_copies import WriteWatch
from .tensor_identity import storage_of


class TensorMemo:
    """Remembers what was made of a tensor, until it is told to forget."""

    def __init__(self) -> None:
        # The tensor is held, so that no other gets its memory.
        self._known: dict[Any, tuple[Tensor | None, WriteWatch | None, Any]] = {}
        self.forget = self._known.clear

    def __call__(self, key: Any, tensor: Tensor | None, make: Callable[[], Any]) -> Any:
        """What ``make`` returned when it was first called for this key and tensor, as it is now."""
        if tensor is not None:
            place = storage_of(tensor), tensor.storage_offset()
            key = key, place, tuple(tensor.shape), tensor.stride(), tensor.dtype
        known = self._known.get(key)
        if known is not None and (tensor is None or known[1] is None or not known[1].written(tensor)):
            return known[2]
        watch = None if tensor is None else WriteWatch(tensor)
        made = make()
        self._known[key] = tensor, watch, made
        return made
