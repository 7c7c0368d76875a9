"""BLOOM: decoder layers with ALiBi."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class Bloom(Adapter):
    """BLOOM.

    There is no option to refuse: the slopes of ALiBi arrive in the product as a bias, and ``slow_but_exact`` and
    ``pretraining_tp`` only cut the projection of the output.
    """

    name = "bloom"
    covers = ("transformers.models.bloom.modeling_bloom",)
    attention = MappingProxyType({"BloomAttention": "self"})
    stack = "decoder"
