"""StableLM: decoder layers with partly rotated heads."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class StableLM(Adapter):
    """StableLM.

    There is no option to refuse: ``qk_layernorm``, ``use_qkv_bias`` and ``partial_rotary_factor`` have been applied
    when the kernel gets q, k and v, and ``use_parallel_residual`` only moves the feed-forward.
    """

    name = "stablelm"
    covers = ("transformers.models.stablelm.modeling_stablelm",)
    attention = MappingProxyType({"StableLmAttention": "self"})
    stack = "decoder"
