"""The frames of this thread's stack and the code of functions, read: which module runs, and what its code asks for.

Public are hooks on modules, and a hook changes a model: torch's fused encoder layers leave their fast path as soon as
one is attached anywhere in them, and a hook on each of many modules costs more than the small model they make. A frame
says the same without touching anything. ``nn.Module.__call__`` leads to ``_call_impl``, whose frame has the module,
``args`` and ``kwargs`` as locals.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import CodeType, FrameType
from typing import Any

from torch import nn

from .private import missing

_PIECE = "searches for the module that runs"


def _code_of_calls() -> CodeType | None:
    """The code of ``nn.Module._call_impl``; None: this torch calls modules in another way."""
    code: CodeType | None = getattr(getattr(nn.Module, "_call_impl", None), "__code__", None)
    fits = code is not None and {"self", "args", "kwargs"} <= set(code.co_varnames)
    return code if fits else None


_CALL = _code_of_calls()


def _check() -> None:
    if _CALL is None:
        missing("torch.nn.Module._call_impl(self, *args, **kwargs)", _PIECE)()


def running_path(paths: Mapping[int, str], model: nn.Module) -> str | None:
    """The path of the innermost module of a model whose forward is on this thread's stack; None: none of them.

    Args:
        paths: module identity -> path, of every module of the model.
        model: the model; ``""`` is returned where somebody calls its forward without calling it.
    """
    if _CALL is None:
        _check()
    frame: FrameType | None = sys._getframe(1)
    found = None
    while frame is not None:
        if frame.f_code is _CALL:
            path = paths.get(id(frame.f_locals.get("self")))
            if path is not None:
                return path
        # The name first: reading a frame's locals copies them, which for every frame would cost more than the kernel.
        elif found is None and frame.f_code.co_name == "forward" and frame.f_locals.get("self") is model:
            found = ""
        frame = frame.f_back
    return found


def call_arguments(module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of the innermost call of a module on this thread's stack; None: nobody called it."""
    _check()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals.get("self") is module:
            return frame.f_locals["args"], frame.f_locals["kwargs"]
        frame = frame.f_back
    return None


def argument_names(function: Any) -> tuple[str, ...]:
    """The positional arguments of a Python function or method, ``self`` left out; () for what has no code to read."""
    code: CodeType | None = getattr(function, "__code__", None)
    return () if code is None else code.co_varnames[1 : code.co_argcount]


def names_used(function: Any) -> tuple[str, ...]:
    """The global names and attributes that the body of a Python function asks for; () for what has no code to read."""
    code: CodeType | None = getattr(function, "__code__", None)
    return () if code is None else code.co_names


def level_outside(package: str) -> int:
    """The ``stacklevel`` of a warning that the calling function gives, for it to name the code that called a package.

    Args:
        package: its name; also left out is what enters and leaves its ``with`` blocks.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] != package and module != "contextlib":
            break
        level, frame = level + 1, frame.f_back
    return level
