"""MPNet: BERT with relative positions."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class MPNet(Adapter):
    """MPNet.

    There is no option to refuse: the relative positions, which all layers share, arrive in the product as a bias
    (``relative_attention_num_buckets``).
    """

    name = "mpnet"
    covers = ("transformers.models.mpnet.modeling_mpnet",)
    attention = MappingProxyType({"MPNetSelfAttention": "self"})
    stack = "encoder"
