"""Swin: a vision encoder whose layers attend within windows, shifted in every second one."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from torch import nn

from hookattn import Adapter, Site


class Swin(Adapter):
    """Swin.

    T and S count the patches of one window, row by row; the windows of an image follow each other in the batch.

    There is no option to refuse: the relative position bias arrives at the kernel as a bias, and so does the -100
    that keeps what a shift has brought together apart (no mask: those weights are tiny, not zero); ``qkv_bias`` is in
    q, k and v.
    """

    name = "swin"
    covers = ("transformers.models.swin.modeling_swin",)
    attention = MappingProxyType({"SwinAttention": "self"})
    stack = "vision"
    axes = "windows"

    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        """Numbered through all stages, which have several layers each."""
        order = [p for p, m in root.named_modules() if type(m).__name__ in self.attention and self.knows(m)]
        return replace(super().site(path, module, root), layer=order.index(path), layers=len(order))
