"""What no rule can say, by model type: one entry a type, a few lines each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """How one type differs from the rules.

    Attributes:
        config: configuration attributes to set, dotted within sub-configurations.
        model: the model class, by name.
        inputs: inputs by name, or functions that make them.
        without: inputs that are left out.
        start: makes the configuration that is then made small, in place of the class's default.
        reason: why there is no case: it is not run, and this is what the coverage page says.
    """

    config: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    start: Callable[[Any], Any] | None = None
    reason: str = ""


RECIPES: dict[str, Recipe] = {}
