"""The traces that are attached to anything, and what is done about those that never came to their end.

A trace ends in the last lines of its block. An interrupt can hit those, too; a forked child has a copy of every trace
of its parent, and none of the threads that would end them.
"""

from __future__ import annotations

from threading import get_ident
from typing import Protocol

from ..torch_internals import forks


class Attached(Protocol):
    """A trace while it is attached.

    Attributes:
        thread: the identity of the thread that it runs in; 0: it is attached to nothing.
        ending: it has begun to end.
    """

    thread: int
    ending: bool

    def stop(self) -> None:
        """Detach everything; can be broken off and called again."""


_live: dict[int, Attached] = {}


def attaches(trace: Attached) -> None:
    """A trace is about to attach itself to something."""
    forks.watch(_in_child)
    _live[id(trace)] = trace


def detached(trace: Attached) -> None:
    """A trace is attached to nothing any more."""
    _live.pop(id(trace), None)


def of_this_thread() -> list[Attached]:
    """The traces that are attached in this thread."""
    here = get_ident()
    return [trace for trace in list(_live.values()) if trace.thread == here]


def heal() -> bool:
    """End the traces of this thread that were broken off while they ended; whether there were any."""
    broken = [trace for trace in of_this_thread() if trace.ending]
    for trace in broken:
        trace.stop()
    return bool(broken)


def _in_child() -> None:
    """In a forked child: end the traces of threads that it does not have. That of its own thread goes on."""
    here = get_ident()
    for trace in list(_live.values()):
        if trace.thread != here:
            trace.stop()
