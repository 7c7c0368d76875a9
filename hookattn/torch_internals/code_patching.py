"""Exchanging the body of a function for as long as any trace runs, wherever its name was imported to.

A Python function keeps its identity and gets another ``__code__``: every ``from x import f`` sees it. A builtin or a
method is replaced as an attribute. Both are counted, and undone when the last trace ends; the exchanged body asks
:func:`~hookattn.taps.active.current` whether its own thread is traced.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

_lock = threading.RLock()
_made: dict[tuple[int, str], Exchange] = {}  # used again as long as they fit: a trace pays for switching alone
BODIES: dict[int, Any] = {}


class Patch(NamedTuple):
    """A Python function whose body is exchanged while a trace runs anywhere in the process.

    ``body`` has the original's signature and is given the original as its first argument; it must behave like the
    original in threads that trace nothing (:func:`~hookattn.taps.active.current` is None there).
    """

    owner: Any
    name: str
    body: Callable[..., Any]


class Exchange:
    """One exchanged function and how many traces need it so."""

    def __init__(self, patch: Patch):
        self.patch, self.users = patch, 0
        self.original = original = vars(patch.owner)[patch.name]
        self.by_code = isinstance(original, types.FunctionType) and isinstance(patch.owner, types.ModuleType)
        if not self.by_code:
            body = patch.body
            if isinstance(patch.owner, types.ModuleType):  # no method: it need not be a Python function
                self.wrapper = functools.update_wrapper(functools.partial(body, original), original)
                return

            @functools.wraps(original)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                return body(original, *args, **kwargs)

            self.wrapper = wrapper
            return
        self.code = original.__code__
        self.signature = inspect.signature(original)  # for whoever asks while it is exchanged
        self.signed = "__signature__" in vars(original)
        copy = types.FunctionType(
            original.__code__, original.__globals__, original.__name__, original.__defaults__, original.__closure__
        )
        copy.__kwdefaults__ = original.__kwdefaults__
        self.body = functools.partial(_uncompiled, patch.body, copy)
        self.other = _trampoline(id(original), self.code)
        self.skipped = False

    def fits(self, patch: Patch) -> bool:
        """Whether it can be used again: the function is still the one it was made for."""
        if vars(self.patch.owner).get(patch.name) is not self.original or self.patch.body is not patch.body:
            return False
        return not self.by_code or self.original.__code__ is self.code

    def install(self) -> None:
        if not self.by_code:
            setattr(self.patch.owner, self.patch.name, self.wrapper)
            return
        function = self.original
        if not self.signed:
            function.__signature__ = self.signature
        BODIES[id(function)] = self.body
        function.__code__ = self.other
        dynamo = sys.modules.get("torch._dynamo.eval_frame")
        if dynamo is not None and not self.skipped:
            self.skipped = True
            for code in (self.other, _uncompiled.__code__):
                dynamo.skip_code(code)

    def remove(self) -> None:
        if self.by_code:
            self.original.__code__ = self.code
            if not self.signed:
                vars(self.original).pop("__signature__", None)
            BODIES.pop(id(self.original), None)
        else:
            setattr(self.patch.owner, self.patch.name, self.original)


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


def install(patches: Iterable[Patch]) -> list[Exchange]:
    """Exchange the functions; returns what :func:`remove` needs."""
    exchanges = []
    with _lock:
        for patch in patches:
            key = (id(patch.owner), patch.name)
            exchange = _made.get(key)
            if exchange is None or (not exchange.users and not exchange.fits(patch)):
                exchange = _made[key] = Exchange(patch)
            if not exchange.users:
                exchange.install()
            exchange.users += 1
            exchanges.append(exchange)
    return exchanges


def remove(exchanges: Iterable[Exchange]) -> None:
    """Undo :func:`install`."""
    with _lock:
        for exchange in exchanges:
            exchange.users -= 1
            if not exchange.users:
                exchange.remove()


def exchanged() -> list[str]:
    """The names of what is exchanged now."""
    return [exchange.patch.name for exchange in _made.values() if exchange.users]
