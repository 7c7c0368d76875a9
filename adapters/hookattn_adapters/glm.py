"""GLM: decoder layers in which half of each head is rotated."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class GLM(Adapter):
    """GLM and GLM 4.

    There is no option to refuse: ``partial_rotary_factor`` has been applied to q and k, and ``attention_bias`` is in
    them.
    """

    name = "glm"
    covers = ("transformers.models.glm.modeling_glm", "transformers.models.glm4.modeling_glm4")
    attention = MappingProxyType({"Glm4Attention": "self", "GlmAttention": "self"})
    stack = "decoder"
