"""OPT: decoder layers with learned positions."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class OPT(Adapter):
    """OPT.

    There is no option to refuse: the scale has been applied to q, ``enable_bias`` is in q, k and v, and
    ``do_layer_norm_before`` and ``word_embed_proj_dim`` are outside the attention.
    """

    name = "opt"
    covers = ("transformers.models.opt.modeling_opt",)
    attention = MappingProxyType({"OPTAttention": "self"})
    stack = "decoder"
