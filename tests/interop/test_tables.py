"""A trace as a long table of pandas and as a labelled array of xarray, against loops over its tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hookattn
import hookattn.interop.tables
from hookattn.errors import FieldNotCaptured, InputError, SelectionError
from tests import tiny_models
from tests.derivations import derivations

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


# ------------------------------------------------------------------------- nothing is derived but what the table holds


def fresh(**options: Any) -> hookattn.Trace:
    """A trace of which nothing was derived yet, and whose certificates are measured."""
    ids = torch.randint(1, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    return hookattn.trace(tiny_models.gpt2(), ids, tokens=WORDS, **options).certify()


@pytest.mark.parametrize("masked", [False, True])
def test_a_table_that_is_too_large_is_refused_before_anything_is_derived(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = fresh()
    rows = (
        sum(int(c.mask.expand(2, c.q.shape[1], 5, 5).sum()) for c in trace) if not masked else 25 * 2 * 4 * len(trace)
    )
    assert rows == len(fresh().to_pandas(masked=masked))
    with derivations() as made:
        monkeypatch.setattr("hookattn.interop.tables.MOST", rows - 1)
        with pytest.raises(SelectionError, match="more than"):
            trace.to_pandas(masked=masked)
        assert not made
        monkeypatch.setattr("hookattn.interop.tables.MOST", rows)
        assert len(trace.to_pandas(masked=masked)) == rows
    assert len(made) == len(trace)


@pytest.mark.parametrize("block", [1, 7, 10**9])
def test_rows_are_counted_in_blocks_of_queries(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(1, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])}
    monkeypatch.setattr("hookattn.interop.tables._BLOCK", block)
    most = hookattn.interop.tables.MOST
    for inputs in (ids, padded):
        trace = hookattn.trace(tiny_models.gpt2(), inputs, tokens=WORDS)
        for part in (trace, trace.select(queries=[1, 4], heads=[1])):
            monkeypatch.setattr("hookattn.interop.tables.MOST", most)
            rows = len(part.to_pandas())
            monkeypatch.setattr("hookattn.interop.tables.MOST", rows - 1)
            with pytest.raises(SelectionError):
                part.to_pandas()
            monkeypatch.setattr("hookattn.interop.tables.MOST", rows)
            assert len(part.to_pandas()) == rows


def test_a_table_derives_its_own_field_alone() -> None:
    for field, each in (("mask", 0), ("entropy", 0), ("scores", 1), ("weights", 1)):
        extra = ("entropy",) if field == "entropy" else ()
        trace = fresh(capture=("q", "k", "v", "bias", "mask", "sinks", "weights", "scores", *extra))
        with derivations() as made:
            table = trace.to_pandas(field)
        assert len(made) == each * len(trace), field
        assert set(table["query_token"]) == {"a", "b", "c", "d", "e", "v", "w", "x", "y", "z"}
        pytest.importorskip("xarray")
        trace = fresh(capture=("q", "k", "v", "bias", "mask", "sinks", "weights", "scores", *extra))
        with derivations() as made:
            trace.to_xarray(field)
        assert len(made) == each * len(trace), field


def test_calls_that_do_not_stack_are_refused_before_anything_is_derived() -> None:
    pytest.importorskip("xarray")
    model = tiny_models.gpt2()
    with hookattn.tracing(model) as steps:
        model(torch.tensor([[1, 2, 3]]))
        model(torch.tensor([[1, 2, 3, 4]]))
    steps.certify()
    with derivations() as made, pytest.raises(SelectionError, match="these differ"):
        steps.to_xarray()
    assert not made


def test_a_mask_alone_has_the_extents_that_are_known() -> None:
    """Of a causal mask that is the same for all heads nothing else tells how many there are."""
    alone = fresh(capture=("mask",))
    assert len(alone.to_pandas("mask")) == 25 * len(alone)
    whole = fresh().to_pandas("mask")
    assert len(whole) == 8 * 25 * len(fresh()) and set(whole["head"]) == {0, 1, 2, 3}
