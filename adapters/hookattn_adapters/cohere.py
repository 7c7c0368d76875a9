"""Cohere's Command models: decoder layers whose attention and feed-forward run beside each other."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class Cohere(Adapter):
    """Cohere and Cohere 2.

    There is no option to refuse: ``use_qk_norm`` and interleaved rotary positions have been applied to q and k when
    the kernel gets them, layers without positions (``layer_types``) just skip that, and ``sliding_window`` is in the
    mask.
    """

    name = "cohere"
    covers = ("transformers.models.cohere.modeling_cohere", "transformers.models.cohere2.modeling_cohere2")
    attention = MappingProxyType({"Cohere2Attention": "self", "CohereAttention": "self"})
    stack = "decoder"
