"""ModernBERT: an encoder with rotary positions that attends to everything or to a window."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class ModernBert(Adapter):
    """ModernBERT.

    There is no option to refuse: ``sliding_window`` and ``layer_types`` are in the mask, each kind of layer rotates q
    and k in its own way before the kernel, and biases are in q, k and v.
    """

    name = "modernbert"
    covers = ("transformers.models.modernbert.modeling_modernbert",)
    attention = MappingProxyType({"ModernBertAttention": "self"})
    stack = "encoder"
