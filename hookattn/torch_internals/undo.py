"""What this thread has changed for a while, written down before it is changed, so that it is always put back.

``try: … finally:`` and ``with`` put things back as long as their own last lines run. An interrupt, a signal handler
that raises or a lack of memory can hit just these, and then gradients stay off or a mode stays open, for the rest of
the process. So whoever changes something of the thread writes down here how it is put back, and strikes it out
afterwards; a trace that ends puts back what is still written since it began.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any


class Change:
    """Something that is changed while a block runs: a context manager, of which a subclass says what.

    ``make`` may be broken off at any place, and ``undo`` may be called when nothing is made yet, and again after it was
    broken off. So ``undo`` sets what there was before, as ``make`` wrote it down, and never counts back.
    """

    __slots__ = ()

    def make(self) -> Any:
        """Change it; what it returns is what the block gets."""
        raise NotImplementedError

    def undo(self) -> None:
        """Put it back."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        changes = _open.changes
        changes.append(self)
        try:
            return self.make()
        except BaseException:
            self._end(changes)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._end(_open.changes)
        except BaseException:
            self._end(_open.changes)
            raise

    def _end(self, changes: list[Change]) -> None:
        # A block that ends late (its exception was kept, and is collected now) was put back by its trace already, and
        # what it would put back may be older than what there is now.
        for at in range(len(changes) - 1, -1, -1):
            if changes[at] is self:
                # What was changed inside this block and is still written down was broken off as it ended.
                while len(changes) > at:
                    changes[-1].undo()
                    changes.pop()
                return


class _Open(threading.local):
    """The changes of each thread that are not put back, the oldest first."""

    def __init__(self) -> None:
        self.changes: list[Change] = []


_open = _Open()


def mark() -> int:
    """How many changes are open now: what :func:`undo_since` takes."""
    return len(_open.changes)


def undo_since(number: int) -> int:
    """Put back all changes but the first ``number``, the newest first; returns how many there were.

    It can be broken off and called again.
    """
    changes = _open.changes
    found = len(changes) - number
    while len(changes) > number:
        changes[-1].undo()
        changes.pop()
    return max(found, 0)
