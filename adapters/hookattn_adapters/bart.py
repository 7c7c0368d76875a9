"""BART and the encoder-decoders with its attention: mBART, Pegasus, Marian, M2M-100, Blenderbot, PLBart."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from torch import nn

from hookattn import Adapter, Site


class Bart(Adapter):
    """BART, mBART, Pegasus, Marian, M2M-100, Blenderbot (small, too) and PLBart.

    They differ in norms and positions, which are outside the attention.

    There is no option to refuse: ``scale_embedding`` and the kind of positions change what enters the first layer,
    and the padding of either side is in the mask.
    """

    name = "bart"
    covers = (
        "transformers.models.bart.modeling_bart",
        "transformers.models.blenderbot.modeling_blenderbot",
        "transformers.models.blenderbot_small.modeling_blenderbot_small",
        "transformers.models.m2m_100.modeling_m2m_100",
        "transformers.models.marian.modeling_marian",
        "transformers.models.mbart.modeling_mbart",
        "transformers.models.pegasus.modeling_pegasus",
        "transformers.models.plbart.modeling_plbart",
    )
    attention = MappingProxyType(
        {
            "BartAttention": "auto",
            "BlenderbotAttention": "auto",
            "BlenderbotSmallAttention": "auto",
            "M2M100Attention": "auto",
            "MarianAttention": "auto",
            "MBartAttention": "auto",
            "PegasusAttention": "auto",
            "PLBartAttention": "auto",
        }
    )

    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        """The stack by the module's own flag, so that a stack traced on its own is named the same."""
        decoder = getattr(module, "is_decoder", False)
        return replace(super().site(path, module, root), stack="decoder" if decoder else "encoder")
