"""SmolLM3: Llama in which some layers have no positions."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class SmolLM3(Adapter):
    """SmolLM3.

    There is no option to refuse: a layer of ``no_rope_layers`` just does not rotate q and k, and
    ``use_sliding_window`` and ``layer_types`` are in the mask.
    """

    name = "smollm3"
    covers = ("transformers.models.smollm3.modeling_smollm3",)
    attention = MappingProxyType({"SmolLM3Attention": "self"})
    stack = "decoder"
