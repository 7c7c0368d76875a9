"""Mistral, Ministral and Mixtral: Llama within a window, with a mixture of experts or without."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class Mistral(Adapter):
    """Mistral, Ministral (3, too) and Mixtral.

    There is no option to refuse: ``sliding_window`` and ``layer_types`` are in the mask, the scale of late positions
    in Ministral 3 has been applied to q when the kernel gets it, and experts leave the attention alone.
    """

    name = "mistral"
    covers = (
        "transformers.models.ministral.modeling_ministral",
        "transformers.models.ministral3.modeling_ministral3",
        "transformers.models.mistral.modeling_mistral",
        "transformers.models.mixtral.modeling_mixtral",
    )
    attention = MappingProxyType(
        {
            "Ministral3Attention": "self",
            "MinistralAttention": "self",
            "MistralAttention": "self",
            "MixtralAttention": "self",
        }
    )
    stack = "decoder"
