"""``trace.attentions`` is what a model of transformers returns with ``output_attentions=True``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn

transformers = pytest.importorskip("transformers")
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TWO_STACKS = {
    "vocab_size": 64,
    "d_model": 16,
    **{
        f"{x}_{y}": n
        for x in ("encoder", "decoder")
        for y, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
    },
}
STACKS = {
    "encoder_attentions": ("encoder", "self"),
    "decoder_attentions": ("decoder", "self"),
    "cross_attentions": ("decoder", "cross"),
}


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def drawn(name: str, config: str, **options: Any) -> Any:
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.3)
    return model.eval()


def eager(model: Any) -> Any:
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return model


def same(got: Any, want: Any) -> None:
    assert isinstance(got, tuple) and len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        if isinstance(b, Tensor):
            assert a.shape == b.shape and (a - b).abs().max() < 1e-6
        else:
            same(a, b)


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("GPT2Model", "GPT2Config", {"vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 2}),
        ("LlamaModel", "LlamaConfig", {**SIZES, "num_key_value_heads": 1}),
        ("BertModel", "BertConfig", SIZES),
        ("AlbertModel", "AlbertConfig", {**SIZES, "embedding_size": 8}),
        ("XLNetModel", "XLNetConfig", {"vocab_size": 64, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}),
        ("DebertaV2Model", "DebertaV2Config", SIZES),
    ],
)
def test_one_stack(name: str, config: str, options: dict[str, Any]) -> None:
    model = drawn(name, config, **options)
    same(hookattn.trace(model, IDS).attentions, eager(model)(IDS, output_attentions=True).attentions)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Bart", TWO_STACKS),
        ("Marian", {**TWO_STACKS, "pad_token_id": 1}),
        ("T5", {"vocab_size": 64, "d_model": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2, "d_ff": 32}),
    ],
)
def test_encoder_and_decoder(name: str, options: dict[str, Any]) -> None:
    model = drawn(f"{name}Model", f"{name}Config", **options)
    given = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
    want = eager(model)(**given, output_attentions=True)
    trace = hookattn.trace(model, given)
    with pytest.raises(hookattn.SelectionError, match="which stack"):
        _ = trace.attentions
    for field, (stack, kind) in STACKS.items():
        same(trace.select(stack=stack, kind=kind).attentions, want[field])


def test_a_generation() -> None:
    model = drawn("BartForConditionalGeneration", "BartConfig", **TWO_STACKS)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 1}
    want = eager(model).generate(IDS, output_attentions=True, return_dict_in_generate=True, **options)
    with hookattn.tracing(model) as trace:
        model.generate(IDS, **options)
    for field, (stack, kind) in STACKS.items():
        same(trace.select(stack=stack, kind=kind).attentions, want[field])


class Chunked(nn.Module):
    """Causal attention in chunks of queries, which get all keys or only those that they may see."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.qkv, self.whole = nn.Linear(16, 48), whole

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out, t = [], x.shape[1]
        for i in range(0, t, 3):
            end = min(i + 3, t)
            s = t if self.whole else end
            mask = torch.ones(t, t, dtype=torch.bool).tril()[i:end, :s]
            out.append(F.scaled_dot_product_attention(q[:, :, i:end], k[:, :, :s], v[:, :, :s], attn_mask=mask))
        return torch.cat(out, 2)


def test_pieces_are_one_tensor_or_none() -> None:
    x = torch.randn(2, 7, 16)
    (weights,) = hookattn.trace(Chunked(True), x).attentions
    assert weights.shape == (2, 2, 7, 7) and not weights.triu(1).any()
    with pytest.raises(hookattn.SelectionError, match="several pieces"):
        _ = hookattn.trace(Chunked(False), x).attentions


def test_nothing_at_all() -> None:
    with pytest.raises(hookattn.SelectionError, match="no calls; skipped: a \\(why\\)"):
        _ = hookattn.Trace(skipped=[hookattn.Skipped("a", "why")]).attentions
