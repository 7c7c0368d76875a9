"""A trace as a long table of pandas and as a labelled array of xarray, against loops over its tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hookattn
from hookattn.errors import FieldNotCaptured, InputError, SelectionError
from tests import tiny_models

pd = pytest.importorskip("pandas")
WORDS = [list("abcde"), list("vwxyz")]


@pytest.fixture(scope="module")
def trace() -> hookattn.Trace:
    ids = torch.randint(1, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    return hookattn.trace(tiny_models.gpt2(), ids, tokens=WORDS)


def test_a_row_for_each_weight(trace: hookattn.Trace) -> None:
    table = trace.to_pandas()
    expected: list[tuple[Any, ...]] = []
    for call in trace:
        for b in range(2):
            for h in range(call.weights.shape[1]):
                for i in range(5):
                    for j in range(i + 1):
                        w = float(call.weights[b, h, i, j])
                        expected.append((call.index, call.site.layer, b, h, i, WORDS[b][i], j, WORDS[b][j], w))
    names = ["call", "layer", "batch", "head", "query", "query_token", "key", "key_token", "value"]
    assert list(table[names].itertuples(index=False, name=None)) == expected
    whole = trace.to_pandas("scores", masked=True)
    assert len(whole) == sum(call.scores.numel() for call in trace)
    assert set(trace.to_pandas("mask")["value"]) == {True, False}


def test_heads_and_queries_have_their_own_numbers(trace: hookattn.Trace) -> None:
    part = trace.select(layer=1, heads=[1], queries=[3, 4], batch=1)
    table = part.to_pandas()
    assert set(table["head"]) == {1} and set(table["query"]) == {3, 4} and set(table["query_token"]) == {"y", "z"}
    assert len(table) == 4 + 5


def test_statistics_have_fewer_axes() -> None:
    ids = torch.randint(1, 20, (1, 5), generator=torch.Generator().manual_seed(0))
    made = hookattn.trace(tiny_models.gpt2(), ids, capture=("entropy", "received", "weights"), tokens=WORDS[0])
    entropy, received = made.to_pandas("entropy"), made.to_pandas("received")
    assert "key" not in entropy and "query" not in received and list(received["key_token"][:5]) == WORDS[0]
    assert entropy["value"].tolist() == [x for c in made for x in c.get("entropy").flatten().tolist()]


def test_cross_attention_has_names_of_both() -> None:
    pytest.importorskip("transformers")
    model = tiny_models.t5()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 9]])}
    trace = hookattn.trace(model, inputs, tokens={"encoder": ["Das", "Haus", "ist", "."], "decoder": ["<s>", "the"]})
    table = trace.select(kind="cross").to_pandas()
    assert list(table["query_token"].unique()) == ["<s>", "the"]
    assert list(table["key_token"].unique()) == ["Das", "Haus", "ist", "."]


def test_what_is_refused(trace: hookattn.Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SelectionError, match="expected one that has a number"):
        trace.to_pandas("q")
    with pytest.raises(InputError):
        trace.to_pandas(7)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        trace.to_pandas(masked=1)  # type: ignore[arg-type]
    with pytest.raises(FieldNotCaptured):
        trace.to_pandas("entropy")
    monkeypatch.setattr("hookattn.interop.tables.MOST", 10)
    with pytest.raises(SelectionError, match=r"more than 10 rows; take a part: trace\.select"):
        trace.to_pandas()


def test_a_labelled_array(trace: hookattn.Trace) -> None:
    pytest.importorskip("xarray")
    made = trace.to_xarray()
    assert made.dims == ("layer", "batch", "head", "query", "key")
    for call in trace:
        own = made.sel(layer=call.site.layer)
        assert torch.equal(torch.from_numpy(own.to_numpy().copy()), call.weights)
        assert own.coords["path"].item() == call.site.path
    assert made.coords["query_token"].to_numpy().tolist() == WORDS
    assert trace.to_xarray("mask").dtype == bool and made.attrs["faithful"]
    part = trace.select(heads=[1], queries=[3]).to_xarray()
    assert part.coords["head"].item() == 1 and part.coords["query"].item() == 3
    model = tiny_models.gpt2()
    with hookattn.tracing(model) as steps:
        model(torch.tensor([[1, 2, 3]]))
        model(torch.tensor([[1, 2, 3, 4]]))
    with pytest.raises(SelectionError, match=r"trace\.select\(stack=…, kind=…, step=…\)"):
        steps.to_xarray()
    assert steps.select(step=1).to_xarray().shape[-1] == 4
