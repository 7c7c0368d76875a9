"""The place of a trace's function mode on its thread's stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class ModeStack:
    """Opens, closes and sets aside our mode.

    ``with mode:`` would not do: torch's own context managers close whatever is innermost, and a model may open a mode
    of its own inside a module and close it outside, or raise with it open. So the stack itself is read and written,
    our mode is found on it by identity, and the modes of others keep their order.

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

    # The function mode

    def on_top(self) -> bool:
        """Whether our mode is the innermost."""
        n = torch._C._len_torch_function_stack()
        return n > 0 and torch._C._get_function_stack_at(n - 1) is self.mode

    def push(self) -> None:
        """Open our mode."""
        torch._C._push_on_torch_function_stack(self.mode)

    def pop(self) -> None:
        """Close the innermost mode."""
        torch._C._pop_torch_function_stack()

    def close(self) -> None:
        """Take our mode off the stack, however often it is on it, and leave the others."""
        if torch._C._len_torch_function_stack():
            for mode in reversed([m for m in self._take() if m is not self.mode]):
                torch._C._push_on_torch_function_stack(mode)
        self.compiling = 0

    def open(self) -> bool:
        """Whether our mode is open, innermost or not."""
        n = torch._C._len_torch_function_stack()
        return n > 0 and any(torch._C._get_function_stack_at(i) is self.mode for i in range(n))

    def _take(self) -> list[TorchFunctionMode]:
        """Pop modes, the topmost first, until ours is not open any more."""
        taken: list[TorchFunctionMode] = []
        while self.open():
            taken.append(torch._C._pop_torch_function_stack())
        return taken

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Without our mode: for kernels that must not see it."""
        taken = self._take()
        others = [m for m in reversed(taken) if m is not self.mode]
        for mode in others:
            torch._C._push_on_torch_function_stack(mode)
        try:
            yield
        finally:
            for _ in others:
                torch._C._pop_torch_function_stack()
            for mode in reversed(taken):
                torch._C._push_on_torch_function_stack(mode)

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
        """With our mode, once."""
        if self.open():
            yield
            return
        self.push()
        try:
            yield
        finally:
            self.pop()


@contextmanager
def beneath(watch: TorchFunctionMode) -> Iterator[None]:
    """Our mode, which is not open, below all that are: it gets what they hand on, and they get nothing of its own."""
    others = _popped()
    for mode in (watch, *reversed(others)):
        torch._C._push_on_torch_function_stack(mode)
    try:
        yield
    finally:
        _popped()
        for mode in reversed(others):
            torch._C._push_on_torch_function_stack(mode)


def _popped() -> list[Any]:
    return [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
