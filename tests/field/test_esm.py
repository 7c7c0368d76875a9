"""fair-esm: ESM-2 with its rotary positions, and the MSA transformer, whose rows attend together."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from torch import Tensor, nn

import hookattn
from tests.field.common import drawn, examine, gap, ids

esm = pytest.importorskip("esm")
if not hasattr(esm, "ProteinBertModel"):
    pytest.skip("another library of this name", allow_module_level=True)

ALPHABET = esm.data.Alphabet.from_architecture("ESM-1b")
ALIGNED = esm.data.Alphabet.from_architecture("MSA Transformer")


def esm2() -> nn.Module:
    torch.manual_seed(0)
    return drawn(esm.ESM2(num_layers=2, embed_dim=32, attention_heads=4, alphabet=ALPHABET))


def proteins() -> Tensor:
    tokens = ids(2, 9, 24, 4)
    tokens[:, 0], tokens[:, -1] = ALPHABET.cls_idx, ALPHABET.eos_idx
    tokens[1, 6], tokens[1, 7:] = ALPHABET.eos_idx, ALPHABET.padding_idx
    return tokens


def msa_transformer() -> nn.Module:
    settings = {"layers": 2, "embed_dim": 32, "ffn_embed_dim": 32, "attention_heads": 4, "max_positions": 64}
    off = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    more = {"logit_bias": True, "max_tokens": 2**14, "embed_positions_msa": True, "arch": "msa_transformer"}
    torch.manual_seed(0)
    return drawn(esm.MSATransformer(Namespace(**settings, **off, **more), ALIGNED))


def alignment() -> Tensor:
    tokens = ids(6, 7, 24, 4).view(2, 3, 7)
    tokens[..., 0] = ALIGNED.cls_idx
    return tokens


def test_esm2() -> None:
    tokens = proteins()
    trace = examine(esm2(), {"tokens": tokens}, calls=2)
    keep = (tokens != ALPHABET.padding_idx)[:, None, None]
    for layer, call in enumerate(trace):
        assert call.site.layer == layer
        assert torch.equal(call.mask.expand_as(call.weights), keep.expand_as(call.weights))


def test_weights_are_those_it_returns_for_its_contacts() -> None:
    model, tokens = esm2(), proteins()
    own = model(tokens, need_head_weights=True)["attentions"]
    real = (tokens != ALPHABET.padding_idx)[:, None, :, None]  # it blanks rows of padding afterwards
    for layer, call in enumerate(hookattn.trace(model, {"tokens": tokens})):
        assert gap(call.weights * real, own[:, layer] * real) < 1e-6


def test_asking_it_for_contacts_changes_nothing() -> None:
    examine(esm2(), {"tokens": proteins(), "return_contacts": True}, calls=2)


def test_rows_of_an_alignment_attend_together_and_columns_apart() -> None:
    model, tokens = msa_transformer(), alignment()
    trace = examine(model, {"tokens": tokens}, calls=4, sharp=1.2)
    own = model(tokens, need_head_weights=True)
    for layer in (0, 1):
        row, column = trace[2 * layer], trace[2 * layer + 1]
        assert (row.site.module, column.site.module) == ("RowSelfAttention", "ColumnSelfAttention")
        assert gap(row.weights, own["row_attentions"][:, layer]) < 1e-6
        theirs = own["col_attentions"][:, layer].permute(0, 2, 1, 3, 4).flatten(0, 1)  # B C H R R
        assert gap(column.weights, theirs) < 1e-6 or gap(column.weights, _swapped(theirs, 2, 7)) < 1e-6


def _swapped(x: Tensor, batch: int, columns: int) -> Tensor:
    """The same with the columns before the batch."""
    return x.unflatten(0, (batch, columns)).transpose(0, 1).flatten(0, 1)
