"""Tokens that are set on a trace are taken as ``tokens=`` takes them; a part of it has those of its entries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import hookattn
from hookattn import analyze
from hookattn.errors import FieldNotCaptured, InputError, SelectionError, UnfitTokensWarning


class Attends(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(-1, (4, 4)).transpose(1, 2)
        return scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)


WORDS = list("abcde")


@pytest.fixture
def trace() -> hookattn.Trace:
    return hookattn.trace(Attends(), torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)))


def test_a_flat_list_is_a_list_for_all_entries(trace: hookattn.Trace, tmp_path: Path) -> None:
    trace.tokens = WORDS  # type: ignore[assignment]
    assert trace.tokens == [WORDS]
    assert hookattn.load(trace.save(tmp_path / "t.safetensors")).tokens == [WORDS]
    assert set(analyze.top_targets(trace, "b")["token"]) == {"b"}
    trace.tokens = (tuple(WORDS), tuple("fghij"))  # type: ignore[assignment]
    assert trace.tokens == [WORDS, list("fghij")]
    trace.tokens = None
    assert trace.tokens is None


def test_lists_by_stack(trace: hookattn.Trace) -> None:
    trace.tokens = {"main": WORDS}  # type: ignore[assignment]
    assert trace.tokens == [WORDS] and trace.stack_tokens == {"main": [WORDS]}
    trace.stack_tokens = {"main": list("vwxyz")}  # type: ignore[dict-item]
    assert trace.stack_tokens == {"main": [list("vwxyz")]}


@pytest.mark.parametrize("wrong", ["abcde", 7, [1, 2], [["a"], [1]], {"a", "b"}, {"main": 3}, [["a"], "b"]])
def test_what_is_none_is_refused_and_changes_nothing(trace: hookattn.Trace, wrong: object) -> None:
    trace.tokens = WORDS  # type: ignore[assignment]
    with pytest.raises(InputError, match="tokens"):
        trace.tokens = wrong  # type: ignore[assignment]
    assert trace.tokens == [WORDS]
    with pytest.raises(InputError):
        trace.stack_tokens = wrong if wrong != {"main": 3} else [WORDS]  # type: ignore[assignment]


@pytest.mark.parametrize("unfit", [list("abc"), [WORDS] * 3, {"decoder": WORDS}])
def test_what_fits_no_call_is_told(trace: hookattn.Trace, unfit: object) -> None:
    with pytest.warns(UnfitTokensWarning):
        trace.tokens = unfit  # type: ignore[assignment]


def test_a_part_of_a_trace(trace: hookattn.Trace, tmp_path: Path) -> None:
    trace.tokens = [WORDS, list("fghij")]
    trace.segments = [[0] * 5, [1] * 5]
    part = trace.select(heads=[1, -1], queries=slice(-2, None), batch=1)
    call = part[0]
    assert (call.heads, call.queries) == ((1, 3), (3, 4)) and part.tokens == [list("fghij")]
    assert part.segments == [[1] * 5]
    assert torch.equal(call.weights, trace[0].weights[1:, [1, 3], 3:])
    again = hookattn.load(part.save(tmp_path / "t.safetensors"))
    assert torch.equal(again[0].weights, call.weights) and again.tokens == part.tokens
    assert trace.select(batch=[1, 0]).tokens == [list("fghij"), WORDS]
    of_a_generator = trace.select(batch=(i for i in [1, 0]), heads=iter([1]), queries=iter([0]))
    assert of_a_generator.tokens == [list("fghij"), WORDS] and {c.weights.shape[:3] for c in of_a_generator} == {
        (2, 1, 1)
    }
    assert trace.select(batch=slice(0, 1)).tokens == [WORDS] and trace.select(heads=0).tokens == trace.tokens
    for wrong in ({"heads": 4}, {"queries": 5}, {"batch": 2}, {"heads": "a"}):
        with pytest.raises(SelectionError):
            trace.select(**wrong)  # type: ignore[arg-type]


def test_a_statistic_is_an_attribute() -> None:
    made = hookattn.trace(Attends(), torch.randn(1, 5, 16), capture=("entropy", "received", "top_k"))
    call = made[0]
    for name in ("entropy", "received", "top_k", "top_k_keys"):
        assert torch.equal(getattr(call, name), call.get(name))
        assert name in dir(call)
    with pytest.raises(FieldNotCaptured, match="lse"):
        _ = call.lse
    with pytest.raises(FieldNotCaptured, match=r"captured: entropy, received, top_k.*\('weights',\) beside the stat"):
        _ = call.weights


def test_every_statistic_is_an_attribute_of_a_call() -> None:
    from hookattn.statistics.registry import STATISTICS

    for name in (*STATISTICS, "top_k_keys"):
        assert isinstance(getattr(hookattn.Call, name), property) and getattr(hookattn.Call, name).__doc__


def test_positions_of_top_targets(trace: hookattn.Trace) -> None:
    last = analyze.top_targets(trace, -1, 1)
    assert set(last["query"]) == {4} and last.attrs["units"]
    assert set(analyze.top_targets(trace, [0, -2], 1)["query"]) == {0, 3}
    assert set(analyze.top_targets(trace, slice(None), 1)["query"]) == set(range(5))
    assert set(analyze.top_targets(trace, slice(-2, None), 1)["query"]) == {3, 4}
    assert analyze.compare(trace, trace).attrs["units"].keys() <= {*analyze.compare(trace, trace).columns}


def test_names_of_the_packages() -> None:
    assert dir(hookattn) == sorted(hookattn.__all__)
    assert dir(analyze) == sorted(analyze.__all__)
