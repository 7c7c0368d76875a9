"""MPT: decoder layers with ALiBi."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class MPT(Adapter):
    """MPT.

    There is no option to refuse: of ``attn_config``, ``softmax_scale`` is the scale, ``clip_qkv`` has been applied to
    q, k and v, and ALiBi arrives in the product as a bias.
    """

    name = "mpt"
    covers = ("transformers.models.mpt.modeling_mpt",)
    attention = MappingProxyType({"MptAttention": "self"})
    stack = "decoder"
