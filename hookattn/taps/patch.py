"""Exchanging the body of a function for as long as any trace runs, wherever its name was imported to.

A Python function keeps its identity and gets another ``__code__``: every ``from x import f`` sees it. A builtin or a
method is replaced as an attribute. Both are counted, and undone when the last trace ends; the exchanged body asks
:func:`~hookattn.taps.current.current` whether its own thread is traced.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from collections.abc import Iterable
from typing import Any

import torch

from .base import Patch

_lock = threading.RLock()
_active: dict[tuple[int, str], _Exchange] = {}
BODIES: dict[int, Any] = {}


class _Exchange:
    """One exchanged function and how many traces need it so."""

    def __init__(self, patch: Patch):
        self.patch, self.users = patch, 0
        self.original = vars(patch.owner)[patch.name]
        self.by_code = isinstance(self.original, types.FunctionType) and isinstance(patch.owner, types.ModuleType)

    def install(self) -> None:
        if not self.by_code:
            body, original = self.patch.body, self.original

            @functools.wraps(original)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                return body(original, *args, **kwargs)

            setattr(self.patch.owner, self.patch.name, wrapper)
            return
        function = self.original
        self.code, self.attributes = function.__code__, dict(vars(function))
        function.__signature__ = _signature(function)  # for whoever asks while it is exchanged
        copy = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        BODIES[id(function)] = functools.partial(_uncompiled, self.patch.body, copy)
        function.__code__ = _trampoline(id(function), self.code)
        dynamo = sys.modules.get("torch._dynamo.eval_frame")
        if dynamo is not None:
            for code in (function.__code__, _uncompiled.__code__):
                dynamo.skip_code(code)

    def remove(self) -> None:
        if self.by_code:
            self.original.__code__ = self.code
            vars(self.original).clear()
            vars(self.original).update(self.attributes)
            BODIES.pop(id(self.original), None)
        else:
            setattr(self.patch.owner, self.patch.name, self.original)


@functools.cache
def _signature(function: types.FunctionType) -> inspect.Signature:
    return inspect.signature(function)


def _uncompiled(body: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a body as plain Python where compiled code calls it, and the original in it compiled, as it would be."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:
        return body(original, *args, **kwargs)
    set_callback = torch._C._dynamo.eval_frame.set_eval_frame
    callback = set_callback(None)

    def compiled(*args: Any, **kwargs: Any) -> Any:
        set_callback(callback)
        try:
            return original(*args, **kwargs)
        finally:
            set_callback(None)

    if callback is None:
        return body(original, *args, **kwargs)
    dynamo.skip_code(compiled.__code__)
    try:
        return body(compiled, *args, **kwargs)
    finally:
        set_callback(callback)


@functools.cache
def _trampoline(key: int, code: types.CodeType) -> types.CodeType:
    """Code that calls ``BODIES[key]``, fit for a function whose globals are not ours."""
    scope: dict[str, Any] = {}
    source = (
        f"def {code.co_name}(*args, **kwargs):\n"
        f"    import {__name__} as patch\n"
        f"    return patch.BODIES[{key}](*args, **kwargs)\n"
    )
    exec(compile(source, __file__, "exec"), scope)
    made: types.CodeType = scope[code.co_name].__code__.replace(co_freevars=code.co_freevars)
    return made


def install(patches: Iterable[Patch]) -> list[tuple[int, str]]:
    """Exchange the functions; returns what :func:`remove` needs."""
    keys = []
    with _lock:
        for patch in patches:
            key = (id(patch.owner), patch.name)
            exchange = _active.get(key)
            if exchange is None:
                exchange = _active[key] = _Exchange(patch)
                exchange.install()
            exchange.users += 1
            keys.append(key)
    return keys


def remove(keys: Iterable[tuple[int, str]]) -> None:
    """Undo :func:`install`."""
    with _lock:
        for key in keys:
            exchange = _active[key]
            exchange.users -= 1
            if exchange.users == 0:
                del _active[key]
                exchange.remove()
