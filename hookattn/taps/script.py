"""Scripted functions (``torch.jit.script``): compiled code that dispatches to no mode, seen as one operation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..torch_internals.code_patching import Patch
from .active import current
from .base import Tap


def body(original: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the function; what it does to scores or weights is unknown, so their own values will be taken."""
    tracing = current()
    if tracing is None:
        return original(function, *args, **kwargs)
    name = f"the scripted function {function.name}"
    return tracing.follow(name, functools.partial(original, function), args, kwargs)


def patches() -> Iterable[Patch]:
    """The call of any scripted function."""
    yield Patch(torch.jit.ScriptFunction, "__call__", body)


TAP = Tap("script", patches=patches)
