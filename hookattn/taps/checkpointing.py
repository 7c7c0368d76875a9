"""``torch.utils.checkpoint``: what it runs again in the backward pass is given the changes of its first run.

``checkpoint`` is handed a function and runs it. Checkpointing that is put on a module by hooks, as torch's composable
one for FSDP is, lets the module run by itself, and only says before and after that it does: to a generator, which is
what ``checkpoint`` without reentrance is made of, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable
from typing import Any

from ..torch_internals.code_patching import Patch
from ..torch_internals.isolation import in_backward
from .active import current
from .base import SecondRun, Tap


def body(original: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Checkpoint a function that knows its second run, where somebody listens."""
    tracing = current()
    if tracing is not None and tracing.listened:
        function = tracing.again(function)
    return original(function, *args, **kwargs)


def generator_body(original: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The same of what is told when a function begins to run, and when it has run."""
    tracing = current()
    if tracing is None or not tracing.listened or in_backward() or _knows(function):
        return original(function, *args, **kwargs)
    again = tracing.again(function)
    return _told(again, original(again, *args, **kwargs))


def _knows(function: Callable[..., Any]) -> bool:
    """Whether a function was made by :func:`body`, whose generator this is."""
    return callable(getattr(function, "ran", None))


def _told(again: SecondRun, steps: Generator[None, None, None]) -> Generator[None, None, None]:
    next(steps)
    yield
    again.ran()
    yield from steps


_GENERATOR = "_checkpoint_without_reentrant_generator"


def patches() -> Iterable[Patch]:
    """The functions, wherever their names were imported to."""
    module = sys.modules.get("torch.utils.checkpoint")
    if module is not None:
        yield Patch(module, "checkpoint", body)
        if _GENERATOR in vars(module):
            yield Patch(module, _GENERATOR, generator_body)


TAP = Tap("checkpointing", patches=patches)
