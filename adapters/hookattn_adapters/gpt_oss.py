"""gpt-oss: decoder layers with a learned sink in every softmax."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class GptOss(Adapter):
    """gpt-oss.

    There is no option to refuse: the sinks are recorded as such (the weights of a row sum to less than one),
    ``sliding_window`` and ``layer_types`` are in the mask, and experts leave the attention alone.
    """

    name = "gpt_oss"
    covers = ("transformers.models.gpt_oss.modeling_gpt_oss",)
    attention = MappingProxyType({"GptOssAttention": "self"})
    stack = "decoder"
