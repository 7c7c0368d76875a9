"""x-transformers: its Attention modules, in whatever order the layers are stacked."""

from __future__ import annotations

import re
from dataclasses import replace
from types import MappingProxyType

from torch import nn

from hookattn import Adapter, Site

_LAYER = re.compile(r"(?:(.*)\.)?layers\.(\d+)\.1")


class XTransformers(Adapter):
    """x-transformers.

    There is no option to refuse: soft-capping, biases, memories and masks show in the kernel's arguments or arithmetic;
    what changes the weights afterwards (talking heads, hard attention) is marked mixed, and distances or sigmoids in
    the place of a softmax over q·k are listed as skipped.
    """

    name = "x-transformers"
    covers = ("x_transformers",)
    attention = MappingProxyType({"Attention": "auto"})  # not the Attend in it, which never sees the heads being split

    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        """Layers of self-attention (``a``), cross-attention (``c``) and others are numbered together by the library."""
        site, found = super().site(path, module, root), _LAYER.fullmatch(path)
        if found is None:
            return site
        layers, index = root.get_submodule(found[1] or ""), int(found[2])
        types = list(getattr(layers, "layer_types", ()))
        decodes = getattr(layers, "causal", False) or getattr(layers, "cross_attend", False)
        return replace(
            site,
            stack="decoder" if decodes else "encoder",
            kind="cross" if types[index] == "c" else "self",
            layer=types[:index].count(types[index]),
            layers=types.count(types[index]),
        )
