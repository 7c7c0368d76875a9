"""What a forked child does about the threads that it does not have."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

_locks: weakref.WeakSet[threading.RLock] = weakref.WeakSet()
_held: list[threading.RLock] = []
_in_child: list[Callable[[], None]] = []
_registered = False


def lock() -> threading.RLock:
    """A lock that is free in a forked child, whichever thread of the parent has it."""
    made = threading.RLock()
    _locks.add(made)
    return made


def lock_of_all() -> threading.RLock:
    """A lock that is waited for before a fork, so that a child never sees what it guards half done."""
    made = threading.RLock()
    _held.append(made)
    return made


def watch(in_child: Callable[[], None]) -> None:
    """From now on a forked child calls this. To be called by what can go wrong in a child, at its first use."""
    global _registered
    if in_child not in _in_child:
        _in_child.append(in_child)
    if not _registered and hasattr(os, "register_at_fork"):
        _registered = True
        os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_child)


def _before() -> None:
    for held in _held:
        held.acquire()


def _after() -> None:
    for held in reversed(_held):
        held.release()


def _child() -> None:
    _after()  # the thread that forked has them, and is the one that is left
    for each in list(_locks):
        if not each._is_owned():  # type: ignore[attr-defined]
            each._at_fork_reinit()  # type: ignore[attr-defined]
    for action in _in_child:
        action()
