"""Llama: decoder layers with rotary positions and grouped queries."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class Llama(Adapter):
    """Llama.

    There is no option to refuse: every kind of ``rope_parameters`` has been applied to q and k (its attention factor
    too) when the kernel gets them, and the number of key heads shows in the shape of k.
    """

    name = "llama"
    covers = ("transformers.models.llama.modeling_llama",)
    attention = MappingProxyType({"LlamaAttention": "self"})
    stack = "decoder"
