"""GPT-NeoX and Pythia: decoder layers with partly rotated heads."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class GPTNeoX(Adapter):
    """GPT-NeoX.

    There is no option to refuse: ``rotary_pct`` has been applied to q and k, ``attention_bias`` is in them, and
    ``use_parallel_residual`` only moves the feed-forward.
    """

    name = "gpt_neox"
    covers = ("transformers.models.gpt_neox.modeling_gpt_neox",)
    attention = MappingProxyType({"GPTNeoXAttention": "self"})
    stack = "decoder"
