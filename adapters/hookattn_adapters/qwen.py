"""Qwen 2 and 3: Llama with biases (2) or norms (3) of q and k, with a mixture of experts or without."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class Qwen(Adapter):
    """Qwen 2, 2.5 (a 2 by its code) and 3, and their mixtures of experts.

    There is no option to refuse: biases and norms are in q, k and v when the kernel gets them,
    ``use_sliding_window``, ``max_window_layers`` and ``layer_types`` are in the mask, and experts leave the attention
    alone.
    """

    name = "qwen"
    covers = (
        "transformers.models.qwen2.modeling_qwen2",
        "transformers.models.qwen2_moe.modeling_qwen2_moe",
        "transformers.models.qwen3.modeling_qwen3",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
    )
    attention = MappingProxyType(
        {
            "Qwen2Attention": "self",
            "Qwen2MoeAttention": "self",
            "Qwen3Attention": "self",
            "Qwen3MoeAttention": "self",
        }
    )
    stack = "decoder"
