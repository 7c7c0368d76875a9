"""CLIP: a text and a vision tower that share one attention class."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from torch import nn

from hookattn import Adapter, Site


class CLIP(Adapter):
    """CLIP.

    There is no option to refuse: the text tower is causal by its mask, and its class token is picked after the
    attention.
    """

    name = "clip"
    covers = ("transformers.models.clip.modeling_clip",)
    attention = MappingProxyType({"CLIPAttention": "self"})

    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        """The tower by the module's configuration, so that one traced on its own is named the same."""
        sees = "vision" in getattr(getattr(module, "config", None), "model_type", path)
        site = super().site(path, module, root)
        return replace(site, stack="vision", axes="patches") if sees else replace(site, stack="text")
