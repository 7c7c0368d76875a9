"""Which trace, if any, is running in this thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .base import ActiveTrace


class _Local(threading.local):
    """What is running in each thread."""

    trace: ActiveTrace | None = None


_local = _Local()


def current() -> ActiveTrace | None:
    """The running trace of this thread, or None; None too inside :func:`paused`."""
    return _local.trace


def set_current(trace: ActiveTrace | None) -> ActiveTrace | None:
    """Make a trace the running one of this thread; returns the one before it."""
    before = current()
    _local.trace = trace
    return before


@contextmanager
def paused() -> Iterator[None]:
    """Nothing is traced inside."""
    before = set_current(None)
    try:
        yield
    finally:
        set_current(before)
