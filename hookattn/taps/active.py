"""Which trace, if any, is running here: in this thread, and in this task of it.

A trace is that of the context (:mod:`contextvars`) that started it, and of what is started from there: an asyncio task
does not see the trace of another task of its thread, and one that is started inside a traced block sees that block's. A
context can be carried to another thread (``asyncio.to_thread``), and a trace can't: its function mode is open in its
own thread alone, and nothing in it is made for two at once.
"""

from __future__ import annotations

from contextvars import ContextVar
from threading import get_ident

from ..torch_internals.undo import Change
from .base import ActiveTrace

_running: ContextVar[ActiveTrace | None] = ContextVar("hookattn_trace", default=None)


def current() -> ActiveTrace | None:
    """The running trace of this thread and context, or None; None too inside :class:`paused`."""
    tracing = _running.get()
    return tracing if tracing is None or tracing.thread == get_ident() else None


def set_current(trace: ActiveTrace | None) -> None:
    """Make a trace the running one of this context."""
    _running.set(trace)


class paused(Change):
    """Nothing is traced inside."""

    __slots__ = ("_before",)

    def __init__(self) -> None:
        self._before = current()

    def make(self) -> None:
        set_current(None)

    def undo(self) -> None:
        set_current(self._before)
