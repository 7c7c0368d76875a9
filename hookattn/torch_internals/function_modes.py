"""The stack of function modes of this thread: which are open, and where on it the mode of a trace is.

Public are only ``with mode:`` and ``TorchFunctionMode`` itself. A ``with`` closes whatever is innermost, and a model
may open a mode of its own inside a module and close it outside, or raise with it open. A trace also has to step aside
for kernels that must not see its mode, and come back to its old place. So the stack is read and written here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch.overrides import TorchFunctionMode

from ..cached import cached_property
from .private import private
from .undo import Change

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


def set_open_modes(modes: Sequence[TorchFunctionMode]) -> None:
    """Make these the open modes, the outermost first. It can be broken off and called again."""
    kept = 0
    while kept < min(depth(), len(modes)) and _at(kept) is modes[kept]:
        kept += 1
    while depth() > kept:
        _pop()
    for mode in modes[kept:]:
        _push(mode)


class _Stack(Change):
    """Other modes are open while a block runs."""

    __slots__ = ("_before", "_modes")

    def __init__(self, modes: Sequence[TorchFunctionMode]):
        self._modes, self._before = modes, open_modes()

    def make(self) -> None:
        set_open_modes(self._modes)

    def undo(self) -> None:
        set_open_modes(self._before)


class _Kept(_Stack):
    """These are the open modes from now on, however often that is broken off."""

    __slots__ = ()

    def undo(self) -> None:
        set_open_modes(self._modes)


class opened(Change):
    """One mode more is open while a block runs: ``with mode:``, but put back whatever happens."""

    __slots__ = ("_mode",)

    def __init__(self, mode: TorchFunctionMode):
        self._mode = mode

    def make(self) -> None:
        _push(self._mode)

    def undo(self) -> None:
        close(self._mode)


class _Nothing(Change):
    """Nothing is changed while a block runs."""

    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_NOTHING = _Nothing()


def close(mode: TorchFunctionMode) -> None:
    """Take a mode off the stack, however often it is on it, and leave the others. It can be called again."""
    n = depth()
    if n and _at(n - 1) is mode:  # mostly it is the innermost
        _pop()
    if any(_at(i) is mode for i in range(depth())):
        with _Kept([m for m in open_modes() if m is not mode]):
            pass


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
        """Take our mode off the stack, however often it is on it, and leave the others. It can be called again."""
        if depth() and "mode" in vars(self):
            close(self.mode)
        self.compiling = 0

    def aside(self) -> AbstractContextManager[None]:
        """Without our mode: for kernels that must not see it. What others opened stays open around the kernel."""
        return _Stack([m for m in open_modes() if m is not self.mode]) if self.open() else _NOTHING

    def sealed(self) -> AbstractContextManager[None]:
        """Without our mode, and with compiled code compiled: for kernels that are read from outside."""
        return _Sealed(self)

    def opened(self) -> AbstractContextManager[None]:
        """With our mode, once: twice on the stack it would see every operation twice."""
        return _NOTHING if self.open() else opened(self.mode)


class _Sealed(Change):
    """See :meth:`ModeStack.sealed`."""

    __slots__ = ("_before", "_compiling", "_stack")

    def __init__(self, stack: ModeStack):
        self._stack, self._compiling, self._before = stack, stack.compiling, open_modes()

    def make(self) -> None:
        self._stack.compiling = self._compiling + 1
        if self._stack.open():
            set_open_modes([m for m in self._before if m is not self._stack.mode])

    def undo(self) -> None:
        set_open_modes(self._before)
        self._stack.compiling = self._compiling


def beneath(mode: TorchFunctionMode) -> AbstractContextManager[None]:
    """With a mode, which is not open, below all that are.

    It gets what the others hand on. They get nothing of what it does itself, which they would with it on top.
    """
    return _Stack([mode, *open_modes()])
