"""T5: an encoder and a decoder that share one attention class."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar

from torch import nn

from hookattn import Adapter, Site


class T5(Adapter):
    """T5.

    There is no option to refuse: nothing is scaled, and the relative position bias, which only a stack's first layer
    owns and all its layers use, arrives at the kernel as a bias. A gated feed-forward leaves the attention alone.
    """

    name = "t5"
    covers: ClassVar[tuple[str, ...]] = ("transformers.models.t5.modeling_t5",)
    attention = MappingProxyType({"T5Attention": "auto"})  # EncDecAttention: cross

    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        """The stack by the module's own flag, so that a stack traced on its own is named the same."""
        decoder = getattr(module, "is_decoder", False)
        return replace(super().site(path, module, root), stack="decoder" if decoder else "encoder")
