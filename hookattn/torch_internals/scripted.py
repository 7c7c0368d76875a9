"""The Python function that compiled code of ``torch.jit`` was made from: kept with it for the compiler alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def made_from(function: Any) -> Callable[..., Any] | None:
    """The Python function that a scripted or traced function was made from; None: it is not known."""
    found = getattr(function, "_torchdynamo_inline", None)
    return found if callable(found) else None
