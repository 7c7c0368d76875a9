"""Heads while a model trains: measured every n steps on fixed prompts, and logged where the training logs.

Nothing is imported unasked: each callback needs the library whose trainer it is for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..optional import extra_named

if TYPE_CHECKING:  # What type checkers and editors see; _MODULES says the same to Python.
    from .head_monitor import HeadMonitor as HeadMonitor
    from .lightning import LightningHeadMonitor as LightningHeadMonitor
    from .prompts import repeated_tokens as repeated_tokens
    from .trainer import TrainerHeadMonitor as TrainerHeadMonitor

_MODULES = {
    "HeadMonitor": f"{__name__}.head_monitor",
    "LightningHeadMonitor": f"{__name__}.lightning",
    "TrainerHeadMonitor": f"{__name__}.trainer",
    "repeated_tokens": f"{__name__}.prompts",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; there are {', '.join(__all__)}.")
    with extra_named():
        return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
