"""What a trace switches in torch while it runs: its function mode, and compilation."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_NOTE = "compiled code ran uncompiled while it was traced, so outputs may differ in the last bits"


class Modes:
    """The place of our function mode on the thread's stack, and the stance towards compiled code."""

    def __init__(self, watch: TorchFunctionMode):
        self.watch = watch
        self._stance = ExitStack()
        self._uncompiled = False

    # Compilation

    def uncompile(self, modules: Iterable[nn.Module]) -> str | None:
        """Run compiled code uncompiled: it can't be watched, and must not be compiled with our mode on.

        Returns:
            A note, if anything was compiled in this process.
        """
        compiled = any(map(_is_compiled, modules))
        dynamo = sys.modules.get("torch._dynamo.utils")
        if not compiled and dynamo is None:
            return None
        self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        self._uncompiled = True
        return _NOTE if compiled or (dynamo is not None and dynamo.counters["frames"]) else None

    def _compiling(self) -> AbstractContextManager[object]:
        return torch.compiler.set_stance("default") if self._uncompiled else nullcontext()

    # The function mode

    def on_top(self) -> bool:
        """Whether our mode is the innermost."""
        n = torch._C._len_torch_function_stack()
        return n > 0 and torch._C._get_function_stack_at(n - 1) is self.watch

    def push(self) -> None:
        """Open our mode."""
        torch._C._push_on_torch_function_stack(self.watch)

    def pop(self) -> None:
        """Close the innermost mode."""
        torch._C._pop_torch_function_stack()

    def close(self) -> None:
        """Take our mode off the stack, however often it is on it, and leave the others; compile again."""
        for mode in reversed([m for m in self._take() if m is not self.watch]):
            torch._C._push_on_torch_function_stack(mode)
        self._stance.close()
        self._uncompiled = False

    def open(self) -> bool:
        """Whether our mode is open, innermost or not."""
        n = torch._C._len_torch_function_stack()
        return any(torch._C._get_function_stack_at(i) is self.watch for i in range(n))

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
        others = [m for m in reversed(taken) if m is not self.watch]
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
        with self.aside(), self._compiling():
            yield

    @contextmanager
    def opened(self) -> Iterator[None]:
        """With our mode."""
        if self.on_top():
            yield
            return
        self.push()
        try:
            yield
        finally:
            self.pop()


def _is_compiled(module: nn.Module) -> bool:
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module, "_orig_mod")
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )
