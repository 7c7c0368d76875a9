"""open_clip: the two towers, and the pooling between them."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from torch import nn

from hookattn import Adapter, Site


class OpenCLIP(Adapter):
    """open_clip.

    Most of its attention is ``nn.MultiheadAttention``, which belongs to torch and is watched as such: the sites here
    are the blocks around it. A text tower has no name of its own in the plain model, and is ``text`` all the same.

    There is no option to refuse: norms and scales of q, k and heads show in the kernel's arguments.
    """

    name = "open_clip"
    covers = ("open_clip",)
    attention = MappingProxyType(
        {
            "Attention": "self",
            "AttentionPool2d": "self",
            "AttentionalPooler": "cross",
            "CustomResidualAttentionBlock": "self",
            "ResidualAttentionBlock": "auto",
        }
    )

    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        """By tower; the pooling at a tower's end is one layer of its own."""
        site, pools = super().site(path, module, root), "Pool" in type(module).__name__
        if pools or path.startswith("visual"):
            site = replace(site, stack="vision", axes="patches")
        else:
            site = replace(site, stack="decoder" if path.startswith("text_decoder") else "text")
        return replace(site, layer=0, layers=1) if pools else site
