"""Exchanging the body of a function for as long as any trace runs, wherever its name was imported to.

``__torch_function__`` is public, and many kernels never come to it: those of other packages, flex_attention, what looks
an implementation up. To replace a module's attribute is public as well, and whoever wrote ``from x import f`` before
keeps the old function. So a Python function keeps its identity and gets another ``__code__``. A builtin or a method is
replaced as an attribute. Both are counted, and undone when the last trace ends; the exchanged body asks
:func:`~hookattn.taps.active.current` whether its own thread is traced.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from . import compilation
from .forks import lock_of_all

_lock = lock_of_all()
_known: dict[tuple[int, str], Exchange] = {}  # used again as long as they fit: a trace pays for switching alone
BODIES: dict[int, Callable[..., Any]] = {}
"""Identity of an exchanged function -> what runs in its place. Its new code finds it here, since it has no globals or
closure of ours to find it in."""


class Patch(NamedTuple):
    """A Python function whose body is exchanged while a trace runs anywhere in the process.

    ``body`` has the original's signature and is given the original as its first argument; it must behave like the
    original in threads that trace nothing (:func:`~hookattn.taps.active.current` is None there).
    """

    owner: Any
    name: str
    body: Callable[..., Any]


class Exchange:
    """One exchanged function, and who needs it so. To install and to remove can each be broken off and done again."""

    def __init__(self, patch: Patch):
        self.patch = patch
        self.users: frozenset[object] = frozenset()
        self.installed = False
        self.original = original = vars(patch.owner)[patch.name]
        self.by_code = isinstance(original, types.FunctionType) and isinstance(patch.owner, types.ModuleType)
        if self.by_code:
            self.code = original.__code__
            self.signature = inspect.signature(original)  # for whoever asks while it is exchanged
            self.signed = "__signature__" in vars(original)
            # The body calls the original, whose own code is gone by then: a copy keeps it.
            self.body = functools.partial(_uncompiled, patch.body, copy_of(original))
            self.trampoline = _trampoline(id(original), self.code)
            self.skipped = False
        else:
            self.wrapper = _wrapper(patch, original)

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
        function.__code__ = self.trampoline
        # Compiled code that calls the function would compile what runs in its place, and keep that when no trace runs.
        if compilation.loaded() and not self.skipped:
            self.skipped = True
            for code in (self.trampoline, _uncompiled.__code__):
                compilation.skip(code)

    def remove(self) -> None:
        if self.by_code:
            self.original.__code__ = self.code
            # BODIES keeps its body: another thread may have begun to run the exchanged code, and look for it now.
            if not self.signed:
                vars(self.original).pop("__signature__", None)
        else:
            setattr(self.patch.owner, self.patch.name, self.original)


def _wrapper(patch: Patch, original: Any) -> Callable[..., Any]:
    """What takes the place of an attribute."""
    body = patch.body
    if isinstance(patch.owner, types.ModuleType):  # no method: it need not be a Python function
        return functools.update_wrapper(functools.partial(body, original), original)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:  # a partial would not be bound to an instance
        return body(original, *args, **kwargs)

    return method


def copy_of(function: types.FunctionType, **names: Any) -> types.FunctionType:
    """The same function a second time; ``names``: globals that the copy sees in place of the module's."""
    scope = {**function.__globals__, **names} if names else function.__globals__
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _uncompiled(body: Callable[..., Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a body as plain Python where compiled code calls it, and the original in it compiled, as it would be."""
    if not compilation.loaded():
        return body(original, *args, **kwargs)
    callback = compilation.callback()
    if callback is None:  # nothing is being compiled
        return body(original, *args, **kwargs)

    def compiled(*args: Any, **kwargs: Any) -> Any:
        with compilation.compiling_by(callback):
            return original(*args, **kwargs)

    compilation.skip(compiled.__code__)
    with compilation.compiling_by(None):
        return body(compiled, *args, **kwargs)


@functools.cache
def _trampoline(key: int, code: types.CodeType) -> types.CodeType:
    """Code that calls ``BODIES[key]``, fit for a function whose globals are not ours.

    It is made from text, since code takes its globals from the function that it is given to: it imports this module by
    name each time. A function only takes code with as many free variables as its closure has cells.
    """
    scope: dict[str, Any] = {}
    source = (
        f"def {code.co_name}(*args, **kwargs):\n"
        f"    import {__name__} as code_patching\n"
        f"    return code_patching.BODIES[{key}](*args, **kwargs)\n"
    )
    exec(compile(source, __file__, "exec"), scope)
    # Free variables that the text has no use for: the count has to be the original's.
    trampoline: types.CodeType = scope[code.co_name].__code__.replace(co_freevars=code.co_freevars)
    return trampoline


def install(patches: Iterable[Patch], user: object) -> None:
    """Exchange functions for a user, who has to call :func:`remove`, also if this is broken off."""
    with _lock:
        for patch in patches:
            key = (id(patch.owner), patch.name)
            exchange = _known.get(key)
            if exchange is None or (not exchange.users and not exchange.fits(patch)):
                exchange = _known[key] = Exchange(patch)
            exchange.users |= {user}  # first: if what follows is broken off, this tells that it is to be undone
            if not exchange.installed:
                exchange.install()
                exchange.installed = True


def remove(user: object) -> None:
    """Undo what :func:`install` did for a user; it can be broken off and called again."""
    with _lock:
        for exchange in _known.values():
            if user in exchange.users:
                others = exchange.users - {user}
                if not others:
                    exchange.installed = False
                    exchange.remove()
                exchange.users = others


def exchanged() -> list[str]:
    """The names of what is exchanged now."""
    return [exchange.patch.name for exchange in _known.values() if exchange.users]
