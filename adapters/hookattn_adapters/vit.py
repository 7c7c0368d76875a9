"""ViT: an encoder over image patches."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class ViT(Adapter):
    """ViT.

    The stack is ``vision``, not ``encoder``: that name is taken by the text model which ViT mostly stands beside.
    Position 0 is the class token, the patches follow row by row.

    There is no option to refuse: ``qkv_bias`` is in q, k and v, and interpolated positions have been added before.
    """

    name = "vit"
    covers = ("transformers.models.vit.modeling_vit",)
    attention = MappingProxyType({"ViTAttention": "self"})
    stack = "vision"
    axes = "patches"
