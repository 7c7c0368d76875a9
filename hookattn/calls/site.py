"""Where an attention call happens, and what a module path says about it."""

from __future__ import annotations

from dataclasses import dataclass

from ..printable import printable


@dataclass(frozen=True, slots=True)
class Site:
    """One place in a model where attention happens.

    Attributes:
        path: the module's path from the traced model; empty for the model itself.
        layer: its index among the layers of its stack; None while it isn't known.
        stack: ``encoder``, ``decoder``, ``vision``, ``text``, … or ``main``.
        kind: ``self``, ``cross``, …
        module: the class name of the module.
        axes: what T and S count: ``tokens``, ``patches``, ``windows``, …
        layers: how many layers the stack has, where the model's structure tells.
    """

    path: str
    layer: int | None = None
    stack: str = "main"
    kind: str = "self"
    module: str = ""
    axes: str = "tokens"
    layers: int | None = None

    @property
    def crosses(self) -> bool:
        """Whether the keys are another sequence's than the queries."""
        return self.kind.startswith("cross")

    @property
    def label(self) -> str:
        """The path as it is printed."""
        return printable(self.path) or "<model>"
