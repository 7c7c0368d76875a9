"""What an adapter is: one architecture family, told to the tracer in one small file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ..calls.site import Site
from .site_names import kind_of, layer_of, stack_of


class Adapter:
    """Knows which modules of an architecture are attention, and where they stand; knows nothing of kernels.

    Subclass it, set the class attributes, and override a method where data is not enough::

        class MyModel(hookattn.Adapter):
            name = "my-model"
            covers = ("my_package.modeling",)
            attention = {"MySelfAttention": "self", "MyCrossAttention": "cross"}

    An adapter is never needed to trace a model. It gives the sites their right names, and it makes tracing cheaper:
    modules whose classes it covers are watched only where it says that attention happens.

    Attributes:
        name: unique among all adapters.
        covers: Python modules (with all below them) whose classes this adapter knows completely.
        attention: class name -> kind (``self``, ``cross``, …) of the modules in which a kernel runs.
        stack: the stack of all its sites; None: told from the path.
        axes: what T and S count.
        layout: class name -> the axes of q as it enters the dot product, a letter each (``BTHD``: batch, queries,
            heads, width), for attention written out by hand whose axes can't be told otherwise.
    """

    name: ClassVar[str] = ""
    covers: ClassVar[tuple[str, ...]] = ()
    attention: ClassVar[Mapping[str, str]] = {}
    stack: ClassVar[str | None] = None
    axes: ClassVar[str] = "tokens"
    layout: ClassVar[Mapping[str, str]] = {}

    def check(self, module: nn.Module) -> None:
        """Refuse a configuration whose math this adapter does not know.

        Args:
            module: a module of :attr:`attention`.

        Raises:
            UnsupportedConfigError: naming the option and its value.
        """

    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        """The site of one attention module."""
        layer, layers = layer_of(path, root)
        return Site(
            path, layer, self.stack or stack_of(path), self.kind(path, module), type(module).__name__, self.axes, layers
        )

    def kind(self, path: str, module: nn.Module) -> str:
        """The kind of one attention module: what :attr:`attention` says, and ``auto`` is told from the path."""
        kind = self.attention[type(module).__name__]
        return kind_of(path) if kind == "auto" else kind

    def knows(self, module: nn.Module) -> bool:
        """Whether the class of a module is one that this adapter covers: never one of another Python module."""
        where = type(module).__module__
        return any(where == name or where.startswith(name + ".") for name in self.covers)

    def describe(self) -> dict[str, Any]:
        """For listings."""
        return {"name": self.name, "covers": list(self.covers), "attention": dict(self.attention)}
