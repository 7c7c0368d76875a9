"""The stack of function modes of this thread: which are open, and where on it the mode of a trace is.

Public are only ``with mode:`` and ``TorchFunctionMode`` itself. A ``with`` closes whatever is innermost, and a model
may open a mode of its own inside a module and close it outside, or raise with it open. A trace also has to step aside
for kernels that must not see its mode, and come back to its old place. So the stack is read and written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

from torch.overrides import TorchFunctionMode

from .private import private

_PIECE = "function modes"

# Bound once: these run several times for every kernel.
depth: Callable[[], int] = private("torch._C", "_len_torch_function_stack", _PIECE)
"""How many function modes are open in this thread."""
_at: Callable[[int], TorchFunctionMode] = private("torch._C", "_get_function_stack_at", _PIECE)
_push: Callable[[TorchFunctionMode], None] = private("torch._C", "_push_on_torch_function_stack", _PIECE)
_pop: Callable[[], TorchFunctionMode] = private("torch._C", "_pop_torch_function_stack", _PIECE)


def open_modes() -> list[TorchFunctionMode]:
    """The function modes of this thread, the outermost first."""
    return [_at(i) for i in range(depth())]


class ModeStack:
    """Opens, closes and sets aside our mode.

    Our mode is found on the stack by identity, and the modes of others keep their order.

    Args:
        make: makes the mode; not called before it is needed, since many traces never open it.

    Attributes:
        compiling: above 0 while compiled code shall run compiled.
    """

    def __init__(self, make: Callable[[], TorchFunctionMode]):
        self._make = make
        self.compiling = 0

    @cached_property
    def mode(self) -> TorchFunctionMode:
        """Our mode."""
        return self._make()

    def on_top(self) -> bool:
        """Whether our mode is the innermost."""
        n = depth()
        return n > 0 and _at(n - 1) is self.mode

    def open(self) -> bool:
        """Whether our mode is open, innermost or not."""
        n = depth()
        # n first: without any mode, ours need not be made to say no.
        return n > 0 and any(_at(i) is self.mode for i in range(n))

    def push(self) -> None:
        """Open our mode."""
        _push(self.mode)

    def pop(self) -> None:
        """Close the innermost mode."""
        _pop()

    def close(self) -> None:
        """Take our mode off the stack, however often it is on it, and leave the others."""
        if depth():
            for mode in reversed([m for m in self._popped_down_to_ours() if m is not self.mode]):
                _push(mode)
        self.compiling = 0

    def _popped_down_to_ours(self) -> list[TorchFunctionMode]:
        """Pop modes, the innermost first, until ours is not open any more; returns them."""
        popped: list[TorchFunctionMode] = []
        while self.open():
            popped.append(_pop())
        return popped

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Without our mode: for kernels that must not see it. What others opened stays open around the kernel."""
        popped = self._popped_down_to_ours()
        others = [m for m in reversed(popped) if m is not self.mode]
        for mode in others:
            _push(mode)
        try:
            yield
        finally:
            # The kernel has closed what it opened, so the innermost modes are the others again. All that was popped
            # goes back in its old order, ours among them.
            for _ in others:
                _pop()
            for mode in reversed(popped):
                _push(mode)

    @contextmanager
    def sealed(self) -> Iterator[None]:
        """Without our mode, and with compiled code compiled: for kernels that are read from outside."""
        self.compiling += 1
        try:
            with self.aside():
                yield
        finally:
            self.compiling -= 1

    @contextmanager
    def opened(self) -> Iterator[None]:
        """With our mode, once: twice on the stack it would see every operation twice."""
        if self.open():
            yield
            return
        self.push()
        try:
            yield
        finally:
            self.pop()


@contextmanager
def beneath(mode: TorchFunctionMode) -> Iterator[None]:
    """With a mode, which is not open, below all that are.

    It gets what the others hand on. They get nothing of what it does itself, which they would with it on top.
    """
    others = _pop_all()
    for each in (mode, *reversed(others)):
        _push(each)
    try:
        yield
    finally:
        _pop_all()
        for each in reversed(others):
            _push(each)


def _pop_all() -> list[TorchFunctionMode]:
    """Empty the stack; returns the modes, the innermost first."""
    return [_pop() for _ in range(depth())]
