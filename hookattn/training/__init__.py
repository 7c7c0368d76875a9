"""Heads while a model trains: measured every n steps on fixed prompts, and logged where the training logs.

Nothing is imported unasked: each callback needs the library whose trainer it is for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..optional import imported_when_asked

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

__getattr__ = imported_when_asked(__name__, _MODULES)


def __dir__() -> list[str]:
    return __all__
