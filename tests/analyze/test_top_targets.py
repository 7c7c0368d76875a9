"""What a token looks at."""

from __future__ import annotations

import pytest
import torch

import hookattn
from hookattn import analyze
from hookattn.errors import FieldNotCaptured, MeasureError, SelectionError
from hookattn.statistics import TopK
from tests import tiny_models
from tests.analyze.build import case, given, uniform
from tests.analyze.test_repeats import Cached, Causal

TOKENS = ["The", "Ġcat", "Ġsaw", "Ġit", ".", "ĠIt", "Ġran", "Ġ(", "it"]


def test_by_text_in_every_layer_and_head() -> None:
    made = case(tokens=[TOKENS, TOKENS[::-1]], heads=(3, 1))
    table = analyze.top_targets(made.trace, "it", 3, example=0)
    assert set(zip(table["query"], table["token"], strict=True)) == {(3, "Ġit"), (8, "it")}
    assert table.groupby(["call", "head", "query"]).size().tolist() == [3] * 8
    for row in table.to_dict("records"):
        own = made.weights[row["call"]][0, (3, 1).index(row["head"]), row["query"]].tolist()
        order = sorted(range(9), key=lambda j, own=own: -own[j])
        assert row["key"] == order[row["rank"] - 1]
        assert row["target"] == TOKENS[row["key"]]
        assert row["weight"] == pytest.approx(own[row["key"]], abs=1e-6)
    other = analyze.top_targets(made.trace, "it", 3, example=1)
    assert set(other["query"]) == {0, 5}
    for row in other.to_dict("records"):
        own = made.weights[row["call"]][1, (3, 1).index(row["head"]), row["query"], row["key"]]
        assert row["weight"] == pytest.approx(float(own), abs=1e-6)


def test_by_word_and_by_position() -> None:
    trace = given(uniform(4), tokens=[["[CLS]", "play", "##ing", "on"]])
    assert set(analyze.top_targets(trace, "playing")["query"]) == {1, 2}
    table = analyze.top_targets(trace, 1, 5)
    assert sorted(table["key"]) == [0, 1]  # what is masked is no target
    assert table["weight"].tolist() == [0.5, 0.5]
    assert analyze.top_targets(given(uniform(4)), 2)["target"].isna().all()


def test_of_steps_and_of_statistics() -> None:
    x = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(1))
    whole = analyze.top_targets(hookattn.trace(Causal(), x), 5, 2)
    model = Cached()
    with hookattn.tracing(model) as steps:
        for part in x.split([5, 1, 1], 1):
            model(part)
    columns = ["head", "query", "rank", "key"]
    assert analyze.top_targets(steps, 5, 2)[columns].equals(whole[columns])
    alone = analyze.top_targets(hookattn.trace(Causal(), x, capture=(TopK(2),)), 5, 2)
    assert alone[columns].equals(whole[columns])
    assert alone["weight"].to_numpy() == pytest.approx(whole["weight"].to_numpy(), abs=1e-6)


def test_cross_attention_by_position() -> None:
    made = case(cross=True, t=3, s=9, tokens=[TOKENS] * 2)
    table = analyze.top_targets(made.trace, 2, 1)
    best = made.weights[0][0, :, 2].argmax(-1)
    assert table[table.call == 0]["key"].tolist() == best.tolist()
    assert table[table.call == 0]["target"].tolist() == [TOKENS[j] for j in best]
    with pytest.raises(MeasureError, match="it needs tokens of its queries; trace again with tokens="):
        analyze.top_targets(made.trace, "it")


def test_nothing_to_show() -> None:
    trace = given(uniform(3), tokens=[list("abc")])
    with pytest.raises(SelectionError, match="'x'"):
        analyze.top_targets(trace, "x")
    with pytest.raises(SelectionError, match="no call"):
        analyze.top_targets(trace, 3)
    with pytest.raises(SelectionError, match="1 batch entries"):
        analyze.top_targets(trace, 0, example=1)
    with pytest.raises(SelectionError, match="int from 1"):
        analyze.top_targets(trace, 0, 0)
    with pytest.raises(MeasureError, match="needs tokens"):
        analyze.top_targets(given(uniform(3)), "a")
    with pytest.raises(FieldNotCaptured):
        analyze.top_targets(hookattn.trace(Causal(), torch.randn(1, 3, 8), capture=("q",)), 0)


def test_by_the_names_of_the_queries_in_cross_attention() -> None:
    """Queries have the names of their own stack, keys those of the other."""
    pytest.importorskip("transformers")
    model = tiny_models.t5()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 9, 10, 9, 3]])}
    source, target = ["Das", "Haus", "ist", "."], ["<s>", "the", "house", "the", "?"]
    trace = hookattn.trace(model, inputs, tokens={"encoder": source, "decoder": target})
    cross = trace.select(stack="decoder", kind="cross")
    table = analyze.top_targets(cross, "the", 2)
    assert set(table["query"]) == {1, 3} and set(table["token"]) == {"the"} and set(table["target"]) <= set(source)
    for row in table.to_dict("records"):
        call = cross.select(layer=row["layer"])[0]
        assert row["weight"] == pytest.approx(float(call.weights[0, row["head"], row["query"], row["key"]]))
        assert source[row["key"]] == row["target"]
    assert set(analyze.top_targets(trace, "the", 2)["kind"]) == {"self", "cross"}
    with pytest.raises(SelectionError, match="no call"):
        analyze.top_targets(cross, "Haus")
    alone = hookattn.trace(model, inputs, tokens=source).select(stack="decoder", kind="cross")
    with pytest.raises(MeasureError, match=r"trace again with tokens=\{'decoder': …\}"):
        analyze.top_targets(alone, "the")
