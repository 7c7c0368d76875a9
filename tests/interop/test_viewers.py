"""BertViz and CircuitsVis take a trace: their own code runs on it, and shows its weights."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import hookattn
from hookattn.errors import FieldNotCaptured, SelectionError
from hookattn.interop import bertviz as ours
from hookattn.interop import circuitsvis
from tests import tiny_models as tiny

WORDS = ["Ġthe", "Ġcat", "s", "Ġsat", ".", "Ġ("]
LABELS = ["the", "cat", "…s", "sat", ".", "␣("]


def traced(model: str = "gpt2", **options: Any) -> hookattn.Trace:
    inputs: dict[str, Any] = {"input_ids": tiny.ids(6)}
    if model == "t5":
        inputs["decoder_input_ids"] = tiny.ids(5)
    return hookattn.trace(getattr(tiny, model)(), inputs, tokens=[WORDS, WORDS], **options)


def shown(html: Any) -> Any:
    """The data in a page of BertViz."""
    text = html.data
    start = text.index('{"attention"')
    return json.JSONDecoder().raw_decode(text, start)[0]["attention"]


@pytest.mark.parametrize("view", ["head_view", "model_view"])
def test_bertviz_shows_the_weights(view: str) -> None:
    pytest.importorskip("bertviz")
    trace = traced()
    data = shown(getattr(ours, view)(trace, batch=1, html_action="return"))[0]
    assert data["left_text"] == data["right_text"] == LABELS
    found = torch.tensor(data["attn"])
    torch.testing.assert_close(found, torch.stack([call.weights[1] for call in trace]))


@pytest.mark.parametrize("view", ["head_view", "model_view"])
def test_bertviz_shows_an_encoder_and_its_decoder(view: str) -> None:
    pytest.importorskip("bertviz")
    trace = traced("t5")
    data = shown(getattr(ours, view)(trace, html_action="return", decoder_tokens=list("vwxyz")))
    places = {"Encoder": ("encoder", "self"), "Decoder": ("decoder", "self"), "Cross": ("decoder", "cross")}
    assert [d["name"] for d in data] == list(places)
    for d in data:
        calls = trace.select(stack=places[d["name"]][0], kind=places[d["name"]][1])
        torch.testing.assert_close(torch.tensor(d["attn"]), torch.stack([call.weights[0] for call in calls]))
        assert d["left_text"] == (LABELS if d["name"] == "Encoder" else list("vwxyz"))
        assert d["right_text"] == (list("vwxyz") if d["name"] == "Decoder" else LABELS)


def test_bertviz_of_a_part() -> None:
    found = ours.to_bertviz(traced("t5").select(kind="cross"))
    assert set(found) == {"cross_attention", "encoder_tokens", "decoder_tokens", "prettify_tokens"}
    assert found["decoder_tokens"] == list("01234") and found["encoder_tokens"] == LABELS


@pytest.mark.parametrize(("make", "message"), [
    (lambda: traced(queries=[1, 2]), "2 queries and 6 keys"),
    (lambda: hookattn.Trace(traced().calls[:1] + traced("bert").calls), "BertViz shows one stack"),
    (lambda: _ragged(), "these are of shapes"),
])  # fmt: skip
def test_what_bertviz_has_no_place_for(make: Any, message: str) -> None:
    with pytest.raises(SelectionError, match=re.escape(message)):
        ours.to_bertviz(make())
    with pytest.raises(FieldNotCaptured, match="trace again with capture="):
        ours.to_bertviz(traced(capture="mask"))


def _ragged() -> hookattn.Trace:
    trace = traced()
    trace.calls[0] = traced(heads=[1, 3])[0]
    return trace


def test_circuitsvis_shows_the_weights() -> None:
    peer = pytest.importorskip("circuitsvis")
    trace = traced()
    page = circuitsvis.attention_heads(trace, {"max_value": 1.0}, batch=1, heads=[2, 0])
    assert isinstance(page, type(peer.attention.attention_heads([[[1.0]]], ["a"])))
    text = str(page)
    data = json.JSONDecoder().raw_decode(text, text.index('{"attention"'))[0]
    expected = torch.cat([call.weights[1, [2, 0]] for call in trace])
    torch.testing.assert_close(torch.tensor(data["attention"]), expected, atol=1e-4, rtol=0)
    assert data["attentionHeadNames"] == ["L0H2", "L0H0", "L1H2", "L1H0"] and data["tokens"] == LABELS
    assert data["maskUpperTri"] is True and data["maxValue"] == 1.0


def test_circuitsvis_of_what_is_not_causal() -> None:
    assert circuitsvis.to_circuitsvis(traced("bert"))["mask_upper_tri"] is False
    found = circuitsvis.to_circuitsvis(traced("bert"), layer=1, queries=[1, 3], keys=[1, 3])
    assert found["tokens"] == ["cat", "sat"] and found["attention"].shape == (4, 2, 2)
    with pytest.raises(SelectionError, match="one list of tokens"):
        circuitsvis.to_circuitsvis(traced(), layer=0, queries=[1])
    with pytest.raises(SelectionError, match="one list of tokens"):
        circuitsvis.to_circuitsvis(traced("t5"), kind="cross")
