"""StarCoder 2: Llama with biases, within a window."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class Starcoder2(Adapter):
    """StarCoder 2.

    There is no option to refuse: ``use_bias`` is in q, k and v, and ``sliding_window`` is in the mask.
    """

    name = "starcoder2"
    covers = ("transformers.models.starcoder2.modeling_starcoder2",)
    attention = MappingProxyType({"Starcoder2Attention": "self"})
    stack = "decoder"
