"""GPT-2, with cross-attention or without."""

from __future__ import annotations

from types import MappingProxyType

from torch import nn

from hookattn import Adapter


class GPT2(Adapter):
    """GPT-2.

    There is no option to refuse: ``scale_attn_weights`` and ``scale_attn_by_inverse_layer_idx`` arrive in the kernel's
    scale, and the arithmetic of ``reorder_and_upcast_attn`` (eager only) is watched like any other.
    """

    name = "gpt2"
    covers = ("transformers.models.gpt2.modeling_gpt2",)
    attention = MappingProxyType({"GPT2Attention": "self"})
    stack = "decoder"

    def kind(self, path: str, module: nn.Module) -> str:
        """One class does both, and carries a flag."""
        return "cross" if getattr(module, "is_cross_attention", False) else super().kind(path, module)
