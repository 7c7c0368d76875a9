"""ESM: BERT over proteins."""

from __future__ import annotations

from types import MappingProxyType

from .bert import Bert


class ESM(Bert):
    """ESM (1b and 2).

    The folding model around it attends over pairs of residues, and is not covered.

    There is no option to refuse: ``position_embedding_type`` rotates q and k before the kernel or adds to what enters
    the first layer, ``token_dropout`` scales the embeddings, and ``is_decoder`` only changes the mask.
    """

    name = "esm"
    covers = ("transformers.models.esm.modeling_esm",)
    attention = MappingProxyType({"EsmSelfAttention": "auto"})
    axes = "residues"
