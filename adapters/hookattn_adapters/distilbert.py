"""DistilBERT: BERT's encoder with half the layers."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class DistilBert(Adapter):
    """DistilBERT.

    There is no option to refuse: ``sinusoidal_pos_embds`` only fills the position table.
    """

    name = "distilbert"
    covers = ("transformers.models.distilbert.modeling_distilbert",)
    attention = MappingProxyType({"DistilBertSelfAttention": "self"})
    stack = "encoder"
