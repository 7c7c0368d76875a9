"""GPT-J and CodeGen: decoder layers with partly rotated heads, attention and feed-forward beside each other."""

from __future__ import annotations

from types import MappingProxyType

from hookattn import Adapter


class GPTJ(Adapter):
    """GPT-J and CodeGen.

    There is no option to refuse: ``rotary_dim`` has been applied to q and k, and CodeGen's order of q, v and k in one
    projection is undone before the product.
    """

    name = "gptj"
    covers = ("transformers.models.codegen.modeling_codegen", "transformers.models.gptj.modeling_gptj")
    attention = MappingProxyType({"CodeGenAttention": "self", "GPTJAttention": "self", "GPTJFlashAttention2": "self"})
    stack = "decoder"
