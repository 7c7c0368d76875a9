"""Granite: Llama with multipliers, with a mixture of experts or without."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class Granite(Adapter):
    """Granite and its mixtures of experts.

    There is no option to refuse: ``attention_multiplier`` is the kernel's scale, the other multipliers are outside
    the attention.
    """

    name = "granite"
    covers = ("transformers.models.granite.modeling_granite", "transformers.models.granitemoe.modeling_granitemoe")
    attention = MappingProxyType({"GraniteAttention": "self", "GraniteMoeAttention": "self"})
    stack = "decoder"
