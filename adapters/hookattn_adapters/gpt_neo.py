"""GPT-Neo: layers that attend to everything and layers that attend to a window, in turn."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class GPTNeo(Adapter):
    """GPT-Neo.

    There is no option to refuse: nothing is scaled, ``attention_types`` and ``window_size`` are in the mask.
    """

    name = "gpt_neo"
    covers = ("transformers.models.gpt_neo.modeling_gpt_neo",)
    attention = MappingProxyType({"GPTNeoFlashAttention2": "self", "GPTNeoSelfAttention": "self"})
    stack = "decoder"
