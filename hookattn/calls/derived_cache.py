"""What was derived from a call's fields and may be read again, up to a number of bytes."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ..torch_internals.forks import lock

LIMIT = 256 << 20
"""Bytes that derived fields of all traces of the process may take, beside those that somebody holds."""

Made = TypeVar("Made")


class Owner(Protocol):
    """What derived values are kept with, so that they go when it goes."""

    made: dict[str, Any]


class DerivedCache:
    """Derived values, each with the object that it is of; of these the ones that were used least recently go first.

    The cache knows an owner by a weak reference alone: a trace that nobody holds is gone with all that was derived of
    it. Safe to use from several threads, which may derive the same twice.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self.size = 0
        self._lock = lock()  # a value that goes may end an owner, whose end is told here
        self._held: OrderedDict[tuple[int, str], tuple[weakref.ref[Any], int]] = OrderedDict()

    def get(self, owner: Owner, name: str, make: Callable[[], Made]) -> Made:
        """A value of an owner, made unless it is held. One of more than half of all there may be is not held."""
        key = id(owner), name
        found = owner.made.get(name)
        if found is not None:
            with self._lock:
                if key in self._held:
                    self._held.move_to_end(key)
            return found  # type: ignore[no-any-return]
        value = make()
        size = sum(x.nbytes for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, Tensor))
        if 2 * size > self.limit:
            return value
        with self._lock:
            owner.made[name] = value
            self._forget(key)
            self._held[key] = weakref.ref(owner, lambda _: self._forget(key)), size
            self.size += size
            while self.size > self.limit:
                oldest = next(iter(self._held))
                gone = self._held[oldest][0]()
                self._forget(oldest)
                if gone is not None:
                    gone.made.pop(oldest[1], None)
        return value

    def _forget(self, key: tuple[int, str]) -> None:
        with self._lock:
            _, size = self._held.pop(key, (None, 0))
            self.size -= size


DERIVED_CACHE = DerivedCache()
"""The one of the process: a bound for each trace would be none for many."""
