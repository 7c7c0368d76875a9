"""DeBERTa: encoders whose scores are a sum of content and position products."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class Deberta(Adapter):
    """DeBERTa and DeBERTa v2 (v3 has the same code).

    There is no option to refuse: ``pos_att_type``, ``share_att_key``, ``position_buckets`` and ``norm_rel_ebd``
    change the position products, which are recorded as the bias, and the scale that all of them share;
    ``conv_kernel_size`` is a convolution beside the first layer.
    """

    name = "deberta"
    covers = ("transformers.models.deberta.modeling_deberta", "transformers.models.deberta_v2.modeling_deberta_v2")
    attention = MappingProxyType({"DisentangledSelfAttention": "self"})
    stack = "encoder"
