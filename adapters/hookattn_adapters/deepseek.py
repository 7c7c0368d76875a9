"""DeepSeek: decoder layers with latent attention."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class DeepSeek(Adapter):
    """DeepSeek V2 and V3 (R1 is a V3).

    Queries and keys are wider than values: a part without and a part with positions, which all heads of k share.

    There is no option to refuse: ``q_lora_rank``, ``kv_lora_rank`` and the widths of the parts have been dealt with
    when the kernel gets q, k and v, as has ``rope_interleave``; the factor of a scaled rotation is in the kernel's
    scale; experts leave the attention alone.
    """

    name = "deepseek"
    covers = (
        "transformers.models.deepseek_v2.modeling_deepseek_v2",
        "transformers.models.deepseek_v3.modeling_deepseek_v3",
    )
    attention = MappingProxyType({"DeepseekV2Attention": "self", "DeepseekV3Attention": "self"})
    stack = "decoder"
