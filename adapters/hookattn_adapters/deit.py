"""DeiT: ViT with a distillation token."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class DeiT(Adapter):
    """DeiT.

    Positions 0 and 1 are the class and the distillation token, the patches follow row by row.

    There is no option to refuse: ``qkv_bias`` is in q, k and v, and interpolated positions have been added before.
    """

    name = "deit"
    covers = ("transformers.models.deit.modeling_deit",)
    attention = MappingProxyType({"DeiTAttention": "self"})
    stack = "vision"
    axes = "patches"
