"""DINOv2, with registers or without, and DINOv3."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class Dinov2(Adapter):
    """DINOv2, DINOv2 with registers and the ViT of DINOv3.

    Position 0 is the class token, registers (where there are some) come next, then the patches row by row.

    There is no option to refuse: biases of q, k and v are in them, rotary positions of DINOv3 have been applied to
    the patches of q and k, and layer scales and gated feed-forwards leave the attention alone.
    """

    name = "dinov2"
    covers = (
        "transformers.models.dinov2.modeling_dinov2",
        "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",
        "transformers.models.dinov3_vit.modeling_dinov3_vit",
    )
    attention = MappingProxyType(
        {
            "Dinov2Attention": "self",
            "Dinov2WithRegistersAttention": "self",
            "DINOv3ViTAttention": "self",
        }
    )
    stack = "vision"
    axes = "patches"
