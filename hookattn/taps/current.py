"""Which trace, if any, is running in this thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_local = threading.local()


def current() -> Any:
    """The running trace of this thread, or None; None too inside :func:`paused`."""
    return getattr(_local, "session", None)


def set_current(session: Any) -> Any:
    """Make a trace the running one of this thread; returns the one before it."""
    before = current()
    _local.session = session
    return before


@contextmanager
def paused() -> Iterator[None]:
    """Nothing is traced inside."""
    before = set_current(None)
    try:
        yield
    finally:
        set_current(before)
