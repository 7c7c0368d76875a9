"""BEiT: a vision encoder with relative position biases."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class Beit(Adapter):
    """BEiT.

    Position 0 is the class token, the patches follow row by row.

    There is no option to refuse: ``use_relative_position_bias`` and ``use_shared_relative_position_bias`` arrive at
    the kernel as a bias, and layer scales leave the attention alone.
    """

    name = "beit"
    covers = ("transformers.models.beit.modeling_beit",)
    attention = MappingProxyType({"BeitAttention": "self"})
    stack = "vision"
    axes = "patches"
