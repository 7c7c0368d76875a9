"""explain against softmax and ranks worked out key by key, and against the words that the lens draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("pandas")
import hookattn
from hookattn import analyze, edit, render
from hookattn.errors import FieldNotCaptured, SelectionError
from tests import tiny_models as tiny

WORDS = ("attended", "drained", "outscored", "masked", "edited")


def traced(name: str, **options: Any) -> hookattn.Trace:
    inputs = {"input_ids": tiny.ids(7)}
    if name == "t5":
        inputs["decoder_input_ids"] = tiny.ids(5)
    with torch.no_grad():
        return hookattn.trace(getattr(tiny, name)(), inputs, **options)


def by_hand(scores: list[float], may: list[bool], key: int, sink: float | None) -> tuple[int, float, int | None]:
    """The rank, the softmax and the rival of one key."""
    allowed = [s for s, m in zip(scores, may, strict=True) if m]
    rank = 1 + sum(s > scores[key] for s in allowed)
    others = [j for j, m in enumerate(may) if m and j != key]
    terms = [scores[j] for j in [*others, key]] + ([] if sink is None else [sink])
    softmax = math.exp(scores[key]) / sum(math.exp(t) for t in terms)
    return rank, softmax, max(others, key=lambda j: scores[j]) if others else None


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "t5", "bert"])
def test_against_plain_arithmetic(name: str) -> None:
    trace = traced(name)
    call = trace[len(trace) - 1]
    kind, stack = call.site.kind, call.site.stack
    table = analyze.explain(trace, layer=call.site.layer, kind=kind, stack=stack, batch=1, queries=[2, -1])
    b, h, t, s = call.weights.shape
    assert len(table) == h * 2 * s and set(table["verdict"]) <= set(WORDS)
    mask = call.mask.broadcast_to(b, h, t, s)
    sinks = call.fields.get("sinks")
    for row in table.to_dict("records"):
        head, query, key = row["head"], row["query"], row["key"]
        scores, may = call.scores[1, head, query].tolist(), mask[1, head, query].tolist()
        sink = None if sinks is None else float(call.sinks[1, head, query])
        rank, softmax, rival = by_hand(scores, may, key, sink)
        assert row["rank"] == rank and row["allowed"] == may[key]
        assert row["softmax"] == pytest.approx(softmax, rel=1e-5)  # of one query, whose products are rounded anew
        assert row["score"] == pytest.approx(scores[key], rel=1e-5, abs=1e-6)
        assert row["weight"] == pytest.approx(float(call.weights[1, head, query, key]), rel=1e-5, abs=1e-7)
        if may[key]:
            assert row["softmax"] == pytest.approx(row["weight"], rel=1e-4, abs=1e-7)
            assert row["equal_share"] == pytest.approx(1 / sum(may))
        else:
            assert row["verdict"] == "masked"
        if rival is None:
            assert row["rival"] is None and math.isnan(row["rival_score"])
        else:
            assert row["rival_score"] == pytest.approx(scores[rival], rel=1e-5, abs=1e-6) and row["rival"] == str(rival)


def test_the_words_are_those_of_the_lens_also_where_an_edit_has_set_a_weight() -> None:
    pytest.importorskip("matplotlib")
    model, ids = tiny.gpt2(), {"input_ids": torch.arange(3, 10)[None]}
    with torch.no_grad():
        trace = hookattn.edited(model, ids, edit.zero("weights", layer=0, heads=1, keys=[0, 2]))
    for head in (1, 2):
        table = analyze.explain(trace, layer=0, heads=head, queries=-1)
        figure = render.lens(trace, layer=0, heads=head)
        drawn = [t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")) if t.get_text() in WORDS]
        assert list(table["verdict"]) == drawn
    assert (analyze.explain(trace, layer=0, heads=1)["verdict"] == "edited").sum() == 2


def test_the_last_query_of_every_call_and_keys_by_their_names() -> None:
    trace = traced("gpt2", tokens=[list("abcdefg")] * 2)
    table = analyze.explain(trace)
    assert set(table["query"]) == {6} and set(table["layer"]) == {0, 1} and set(table["token"]) == {"g"}
    some = analyze.explain(trace, layer=0, heads=0, queries=4, keys=[0, 3])
    assert list(some["target"]) == ["a", "d"] and list(some["key"]) == [0, 3]
    assert table.attrs["units"]["weight"] == "share" and "ln" in table.attrs["units"]["score"]


def test_what_it_refuses() -> None:
    with pytest.raises(FieldNotCaptured):
        analyze.explain(traced("gpt2", capture=("mask",)))
    with pytest.raises(SelectionError):
        analyze.explain(traced("gpt2"), layer=9)


def test_a_query_that_may_attend_to_nothing() -> None:
    class Blind(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.ones(4, 4, dtype=torch.bool).tril(-1)  # the first query sees nothing
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    trace = hookattn.trace(torch.nn.Sequential(Blind()), torch.randn(1, 2, 4, 8))
    table = analyze.explain(trace, heads=0, queries=0)
    assert set(table["verdict"]) == {"masked"} and table["equal_share"].isna().all() and table["rival"].isna().all()
    one = analyze.explain(trace, heads=0, queries=1)
    assert (
        list(one["verdict"]) == ["attended"] + ["masked"] * 3 and one["rival"].isna().tolist() == [True] + [False] * 3
    )


def test_no_softmax_is_refused() -> None:
    class Relu(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x @ x.mT) @ x

    trace = hookattn.trace(torch.nn.Sequential(Relu()), torch.randn(1, 2, 4, 8))
    with pytest.raises(SelectionError, match="explain tells why a softmax"):
        analyze.explain(trace)
