"""SigLIP: a text and a vision tower, and a pooling with a learned query."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from torch import nn

from hookattn import Adapter, Site


class Siglip(Adapter):
    """SigLIP and SigLIP 2.

    The pooling is an ``nn.MultiheadAttention``, which belongs to torch; its site is the head around it.

    There is no option to refuse: the text tower is not causal, and the patches that pad an image in SigLIP 2 are in
    the mask.
    """

    name = "siglip"
    covers = ("transformers.models.siglip.modeling_siglip", "transformers.models.siglip2.modeling_siglip2")
    attention = MappingProxyType(
        {
            "Siglip2Attention": "self",
            "Siglip2MultiheadAttentionPoolingHead": "cross",
            "SiglipAttention": "self",
            "SiglipMultiheadAttentionPoolingHead": "cross",
        }
    )

    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        """The tower by the module's configuration; the pooling at its end is one layer of its own."""
        site, pools = super().site(path, module, root), "Pooling" in type(module).__name__
        if pools:
            return replace(site, layer=0, layers=1, stack="vision", axes="patches")
        sees = "vision" in getattr(getattr(module, "config", None), "model_type", path)
        return replace(site, stack="vision", axes="patches") if sees else replace(site, stack="text")
