"""Gemma: decoder layers with few key heads, soft-capped scores (2) and norms of q and k (3)."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class Gemma(Adapter):
    """Gemma, Gemma 2, and the text model of Gemma 3.

    There is no option to refuse: ``query_pre_attn_scalar`` is in the kernel's scale, ``attn_logit_softcapping`` in
    its soft-cap, ``sliding_window``, ``layer_types`` and ``use_bidirectional_attention`` in its mask; each kind of
    layer may rotate in its own way, which q and k have behind them.
    """

    name = "gemma"
    covers = (
        "transformers.models.gemma.modeling_gemma",
        "transformers.models.gemma2.modeling_gemma2",
        "transformers.models.gemma3.modeling_gemma3",
    )
    attention = MappingProxyType({"Gemma2Attention": "self", "Gemma3Attention": "self", "GemmaAttention": "self"})
    stack = "decoder"
