"""The frames of this thread's stack and the code of functions, read: which module runs, and what its code asks for.

Public are hooks on modules, and a hook changes a model: torch's fused encoder layers leave their fast path as soon as
one is attached anywhere in them, and a hook on each of many modules costs more than the small model they make. A frame
says the same without touching anything. ``nn.Module.__call__`` leads to ``_call_impl``, whose frame has the module,
``args`` and ``kwargs`` as locals.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Iterable, Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import nn

from .private import missing

_PIECE = "searches for the module that runs"


def _code_of_calls() -> CodeType | None:
    """The code of ``nn.Module._call_impl``; None: this torch calls modules in another way."""
    code: CodeType | None = getattr(getattr(nn.Module, "_call_impl", None), "__code__", None)
    fits = code is not None and {"self", "args", "kwargs"} <= set(code.co_varnames)
    return code if fits else None


_CALL = _code_of_calls()
_STAGE = "torch.distributed.pipelining.stage"


def _check() -> None:
    if _CALL is None:
        missing("torch.nn.Module._call_impl(self, *args, **kwargs)", _PIECE)()


def running_path(paths: Mapping[int, str]) -> str | None:
    """The path of the innermost module of a model whose forward is on this thread's stack; None: none of them.

    Args:
        paths: module identity -> path, of every module of the model.
    """
    if _CALL is None:
        _check()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # The name first: reading a frame's locals copies them, which for every frame would cost more than the kernel.
        # A forward that nobody went through __call__ for is one all the same.
        if frame.f_code is _CALL or frame.f_code.co_name == "forward":
            path = paths.get(id(frame.f_locals.get("self")))
            if path is not None:
                return path
        frame = frame.f_back
    return None


def inside(module: str, function: str) -> bool:
    """Whether a function runs on this thread's stack.

    Args:
        module: the name of its module.
        function: its qualified name, as ``Class.method``.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_qualname == function and frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False


def in_rehearsal() -> bool:
    """Whether a pipeline stage runs its part to learn the shapes of what it returns, on memory that nobody has filled.

    A stage runs a microbatch in ``forward_one_chunk``, and does so nowhere else.
    """
    if _STAGE not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe(1)
    found = False
    while frame is not None:
        if frame.f_globals.get("__name__") == _STAGE:
            if frame.f_code.co_name == "forward_one_chunk":
                return False
            found = True
        frame = frame.f_back
    return found


class Outermost(NamedTuple):
    """What of a model runs, and was not called by anything else of it.

    Attributes:
        path: of the outermost module whose forward is on the stack.
        run: stands for this one execution of its forward: equal to itself as long as it lasts, and to no other.
        method: stands for the execution of the outermost method of one of the model's modules around it, such as
            ``generate``; None: there is none.
    """

    path: str
    run: object
    method: object | None


def outermost(paths: Mapping[int, str], methods: frozenset[str]) -> Outermost | None:
    """Which module of a model was called first of all that run on this thread's stack; None: none runs.

    Args:
        paths: module identity -> path, of every module of the model.
        methods: the names of all their methods (:func:`method_names`).
    """
    _check()
    frame: FrameType | None = sys._getframe(1)
    found: tuple[str, FrameType] | None = None
    around: FrameType | None = None
    while frame is not None:
        code = frame.f_code
        if code is _CALL:
            path = paths.get(id(frame.f_locals.get("self")))
            if path is not None:
                found, around = (path, frame), None
        # The name first, for the same reason; and of whose method it is the module's class is asked, since any function
        # may be named so.
        elif code.co_name in methods and code.co_argcount and code.co_filename != _CALL.co_filename:  # type: ignore[union-attr]
            first = frame.f_locals.get(code.co_varnames[0])
            path = paths.get(id(first))
            if path is not None and _is_method(type(first), code):
                if code.co_name == "forward":
                    found, around = (path, frame), None
                elif found is not None:
                    around = frame
        frame = frame.f_back
    if found is None:
        return None
    return Outermost(found[0], _execution(found[1]), None if around is None else _execution(around))


def method_names(classes: Iterable[type]) -> frozenset[str]:
    """The names of what the classes of some modules define, those that they inherit from included."""
    kinds = {base for cls in classes for base in cls.__mro__} - set(nn.Module.__mro__)
    return frozenset().union(*map(vars, kinds))


def _is_method(cls: type, code: CodeType) -> bool:
    """Whether a class runs this code where its method of that name is called, under whatever decorators."""
    body = inspect.unwrap(getattr(cls, code.co_name, None), stop=lambda f: getattr(f, "__code__", None) is code)  # type: ignore[arg-type]
    return getattr(body, "__code__", None) is code


class _Mark:
    """Left on a frame to know it again; the frame holds it, so that the mark ends with it, and nothing holds the frame.

    ``f_trace`` is what a debugger calls for each line of a frame while one is at work. Called so, a mark does nothing.
    """

    __slots__ = ("__weakref__",)

    def __call__(self, *_: Any) -> _Mark:
        return self


def _execution(frame: FrameType) -> object:
    """Stands for one execution of a function. Frames themselves would keep all their locals alive."""
    if frame.f_trace is None:
        frame.f_trace = _Mark()
    # A debugger has its own there: then the frame is held, and with it what the function had.
    return weakref.ref(frame.f_trace) if isinstance(frame.f_trace, _Mark) else frame


def count_calls(module: nn.Module) -> int:
    """How many calls of a module are on this thread's stack."""
    _check()
    frame: FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None:
        count += frame.f_code is _CALL and frame.f_locals.get("self") is module
        frame = frame.f_back
    return count


def running_line(module: nn.Module) -> tuple[str, int] | None:
    """File and line where the innermost forward of a module on this thread's stack is; None: it is not running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_locals.get("self") is module:
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


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
