"""Phi: decoder layers with partly rotated heads."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class Phi(Adapter):
    """Phi (1 to 3; 4 is a 3 by its code).

    There is no option to refuse: ``qk_layernorm``, ``partial_rotary_factor`` and every kind of rotation have been
    applied to q and k when the kernel gets them, and ``sliding_window`` is in the mask.
    """

    name = "phi"
    covers = ("transformers.models.phi.modeling_phi", "transformers.models.phi3.modeling_phi3")
    attention = MappingProxyType({"Phi3Attention": "self", "PhiAttention": "self"})
    stack = "decoder"
