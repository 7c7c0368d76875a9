"""Where an attention call happens, and what a module path says about it."""

from __future__ import annotations

from dataclasses import dataclass

from ..printable import printable

WRAPPED = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""The names under which wrappers keep what they are around: of DDP and engines, and of what compiles, shards and
checkpoints."""


def without_wrappers(path: str) -> str:
    """A path, or a pattern of paths, without the names that wrappers put into it.

    For a path that somebody gives and that is none: a module of a model's own may have such a name.
    """
    return ".".join(part for part in path.split(".") if part not in WRAPPED)


@dataclass(frozen=True, slots=True)
class Site:
    """One place in a model where attention happens.

    Attributes:
        path: the module's path from the traced model, without what is put around modules (DDP, compilers, FSDP and
            their kind); empty for the model itself.
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
