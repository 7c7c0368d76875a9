"""vit-pytorch: the attention of its many vision transformers, numbered through all stages."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from torch import nn

from hookattn import Adapter, Site

_NAMES = """
    Attention DSSA GlobalAttention InteractiveWindowedSelfAttention LSA LocalAttention MutualAttention PatchMerger
    ScalableSelfAttention WindowAttention XCAttention
""".split()


class ViTPytorch(Adapter):
    """vit-pytorch.

    There is no option to refuse: each model is a file of its own, and its arithmetic is watched. ``PatchMerger``
    attends with learned queries. In cross-covariance attention T and S count channels.
    """

    name = "vit-pytorch"
    covers = ("vit_pytorch",)
    attention = MappingProxyType({**dict.fromkeys(_NAMES, "auto"), "MutualAttention": "cross", "PatchMerger": "cross"})
    stack = "vision"
    axes = "patches"

    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        """Numbered in the order of the model: a path may start with a stage, and stages have several layers."""
        site = super().site(path, module, root)
        alike = [p for p, m in root.named_modules() if type(m).__name__ in self.attention and self.knows(m)]
        order = [p for p in alike if self.kind(p, root.get_submodule(p)) == site.kind]
        axes = "channels" if type(module).__name__ == "XCAttention" else self.axes
        return replace(site, layer=order.index(path), layers=len(order), axes=axes)
