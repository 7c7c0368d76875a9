"""GPT-BigCode (SantaCoder, StarCoder): GPT-2 with a single key head."""

from __future__ import annotations

from types import MappingProxyType

from torch import nn

from hookattn import Adapter


class GPTBigCode(Adapter):
    """GPT-BigCode.

    There is no option to refuse: ``multi_query`` shows in the shapes of k and v, ``scale_attn_weights`` in the
    kernel's scale; the upcast of ``attention_softmax_in_fp32`` is watched like any arithmetic.
    """

    name = "gpt_bigcode"
    covers = ("transformers.models.gpt_bigcode.modeling_gpt_bigcode",)
    attention = MappingProxyType({"GPTBigCodeAttention": "self"})
    stack = "decoder"

    def kind(self, path: str, module: nn.Module) -> str:
        """One class does both, and carries a flag."""
        return "cross" if getattr(module, "is_cross_attention", False) else super().kind(path, module)
