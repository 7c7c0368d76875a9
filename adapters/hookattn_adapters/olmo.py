"""OLMo: decoder layers whose q, k and v may be clipped (1) or normed (2, 3), with experts or without."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class Olmo(Adapter):
    """OLMo 1 to 3 and OLMoE.

    There is no option to refuse: ``clip_qkv`` and the norms have been applied when the kernel gets q, k and v,
    ``sliding_window`` and ``layer_types`` are in the mask, and experts leave the attention alone.
    """

    name = "olmo"
    covers = (
        "transformers.models.olmo.modeling_olmo",
        "transformers.models.olmo2.modeling_olmo2",
        "transformers.models.olmo3.modeling_olmo3",
        "transformers.models.olmoe.modeling_olmoe",
    )
    attention = MappingProxyType(
        {
            "Olmo2Attention": "self",
            "Olmo3Attention": "self",
            "OlmoAttention": "self",
            "OlmoeAttention": "self",
        }
    )
    stack = "decoder"
