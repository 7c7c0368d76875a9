"""sentence-transformers: a BERT inside its pipeline of modules, called and through ``encode``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from tests.field.common import drawn, examine, gap

sentence_transformers = pytest.importorskip("sentence_transformers")
parts = pytest.importorskip("sentence_transformers.models")
transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat", "on", "the", "mat", "dog", "ran"]
SENTENCES = ["the cat sat on the mat", "a dog ran"]


@pytest.fixture
def model(tmp_path: Path) -> Any:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    drawn(transformers.BertModel(config)).save_pretrained(tmp_path)
    words = parts.Transformer(str(tmp_path))
    pooling = parts.Pooling(32)
    return sentence_transformers.SentenceTransformer(modules=[words, pooling], device="cpu").eval()


def features(model: Any) -> dict[str, Any]:
    tokenize = getattr(model, "preprocess", None) or model.tokenize
    return dict(tokenize(SENTENCES))


def test_one_call(model: Any) -> None:
    trace = examine(model, (features(model),), calls=2)
    assert {(c.site.stack, c.site.module) for c in trace} == {("encoder", "BertSelfAttention")}
    assert [c.site.path for c in trace] == [f"0.model.encoder.layer.{i}.attention.self" for i in (0, 1)]
    keep = features(model)["attention_mask"].bool()
    for call in trace:
        assert torch.equal(call.mask.expand_as(call.weights), keep[:, None, None].expand_as(call.weights))


def test_weights_are_those_of_the_model_in_it(model: Any) -> None:
    given = features(model)
    bert = model[0].model if hasattr(model[0], "model") else model[0].auto_model
    trace = hookattn.trace(model, (dict(given),))
    bert.set_attn_implementation("eager")
    own = bert(given["input_ids"], given["attention_mask"], output_attentions=True).attentions
    for call, weights in zip(trace, own, strict=True):
        assert gap(call.weights, weights) < 1e-5


def test_encode_is_traced_batch_by_batch(model: Any) -> None:
    plain = model.encode(SENTENCES, batch_size=1)
    with hookattn.tracing(model, verify="full", strict=True) as trace:
        traced = model.encode(SENTENCES, batch_size=1)
    assert (plain == traced).all()
    assert [call.step for call in trace] == [0, 0, 1, 1]


def test_from_a_text(model: Any) -> None:
    found, expected = hookattn.trace_text(model, SENTENCES), hookattn.trace(model, (features(model),))
    assert found.tokens is not None and found.tokens[1][:5] == ["[CLS]", "a", "dog", "ran", "[SEP]"]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.weights, other.weights)
