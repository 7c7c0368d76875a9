"""``torch.utils.checkpoint``: what it runs again in the backward pass is given the changes of its first run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from ..torch_internals.code_patching import Patch
from .active import current
from .base import Tap


def body(original: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Checkpoint a function that knows its second run, where somebody listens."""
    tracing = current()
    if tracing is not None and tracing.listened:
        function = tracing.again(function)
    return original(function, *args, **kwargs)


def patches() -> Iterable[Patch]:
    """The function, wherever its name was imported to."""
    module = sys.modules.get("torch.utils.checkpoint")
    if module is not None:
        yield Patch(module, "checkpoint", body)


TAP = Tap("checkpointing", patches=patches)
