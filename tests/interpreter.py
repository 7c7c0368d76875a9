"""Triton's interpreter for tests: kernels run on the CPU, line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hookattn.attention.kernels import launch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    """Where no GPU is: kernels are decorated for the interpreter, and so is what Triton itself wrote in its language,
    which something else may have imported long ago."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            import triton.language as tl
            from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
            from triton.runtime.jit import JITFunction

            dot = InterpreterBuilder.create_dot

            def dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
                """The interpreter would multiply the bits of bfloat16 as integers."""
                wide = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
                return dot(self, *wide, *rest)

            patch.setattr(InterpreterBuilder, "create_dot", dot_of_numbers)
            patch.setenv("TRITON_INTERPRET", "1")
            for name in [name for name in sys.modules if name.startswith("triton.language")]:
                for key, value in list(vars(sys.modules[name]).items()):
                    if isinstance(value, JITFunction):
                        patch.setattr(sys.modules[name], key, InterpretedFunction(value.fn))
            launch.kernels()
        yield


class Broken:
    """A kernel that does not fit; counts how often it was tried."""

    def __init__(self) -> None:
        self.tried = 0

    def __getitem__(self, grid: Any) -> Any:
        self.tried += 1
        raise RuntimeError("out of resource: shared memory\nat length")
