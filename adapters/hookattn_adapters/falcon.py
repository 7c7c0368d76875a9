"""Falcon: decoder layers with one key head or few, and rotary positions or ALiBi."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class Falcon(Adapter):
    """Falcon.

    There is no option to refuse: ``multi_query`` and ``new_decoder_architecture`` show in the shapes of k and v,
    ``alibi`` arrives in the product as a bias, ``parallel_attn`` only moves the feed-forward.
    """

    name = "falcon"
    covers = ("transformers.models.falcon.modeling_falcon",)
    attention = MappingProxyType({"FalconAttention": "self", "FalconFlashAttention2": "self"})
    stack = "decoder"
