"""BERT, as an encoder or (``is_decoder``) as a decoder, with cross-attention or without."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar

from torch import nn

from hookattn import Adapter, Site


class Bert(Adapter):
    """BERT.

    There is no option to refuse: the scale is an argument of the kernel, ``is_decoder`` only changes the mask, and a
    chunked feed-forward leaves the attention alone.
    """

    name = "bert"
    covers: ClassVar[tuple[str, ...]] = ("transformers.models.bert.modeling_bert",)
    attention = MappingProxyType({"BertCrossAttention": "cross", "BertSelfAttention": "self"})

    def site(self, path: str, module: nn.Module, root: nn.Module) -> Site:
        """The stack is the configuration's word: the path says ``encoder`` in a decoder too."""
        decoder = getattr(module, "is_decoder", True)  # cross-attention has no such flag, and only decoders have it
        return replace(super().site(path, module, root), stack="decoder" if decoder else "encoder")
