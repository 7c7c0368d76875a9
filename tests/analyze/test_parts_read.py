"""What analyzers derive of a trace: a block of heads at a time, and only what a table is of."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

pytest.importorskip("pandas")

import hookattn
from hookattn import analyze
from hookattn.analyze import call_view
from hookattn.analyze.score_inputs import score_inputs_of
from hookattn.calls import deriving
from hookattn.calls.call import Call
from tests.derivations import Derived, derivations

HEADS, LAYERS, T, B = 6, 3, 20, 2
WORDS = [[f"{'Ġ' if i % 3 else ''}w{i % 7}" for i in range(T)]] * B


class Attention(nn.Module):
    """Causal, six heads on three key heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 24), nn.Linear(24, 12), nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + sdpa(3 * q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


def traced() -> hookattn.Trace:
    torch.manual_seed(0)
    return hookattn.trace(nn.Sequential(*(Attention() for _ in range(LAYERS))), torch.randn(B, T, 24), tokens=WORDS)


@pytest.fixture
def trace() -> hookattn.Trace:
    return traced()


@pytest.fixture
def blocks_of_two_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_view, "_BLOCK", 2 * B * T * T)


def kept(trace: hookattn.Trace) -> hookattn.Trace:
    """The same with weights and scores that are there, as the numbers of a model's own."""
    fields = [{name: call.get(name) for name in call.fields} for call in trace]
    return hookattn.Trace([made_of(call, own) for call, own in zip(trace, fields, strict=True)], tokens=trace.tokens)


def made_of(call: Call, fields: Any) -> Call:
    made = call.at()
    made.fields = fields
    return made


BY_HEADS: dict[str, Callable[[hookattn.Trace], Any]] = {
    "report": analyze.report,
    "measure": lambda trace: analyze.measure(trace, ["value_norm", analyze.DistanceCorrelation()]),
    "by query": lambda trace: analyze.measure(trace, ["induction", "same_word"], by="query"),
    "compare": lambda trace: analyze.compare(trace, traced()),
    "normalisation": lambda trace: analyze.normalisation(trace, tolerance=1e-9),
    "distance_decay": analyze.distance_decay,
    "received": analyze.received,
    "score_rank": lambda trace: analyze.score_rank(trace, masked=True),
    "singular_values": lambda trace: analyze.singular_values(trace, masked=True),
    "aggregate": lambda trace: [analyze.aggregate(trace, how) for how in ("mean", "max", "min", "norm")],
    "aggregate_layers": lambda trace: [analyze.aggregate_layers(trace, how) for how in ("mean", "max", "min", "norm")],
    "rollout": analyze.rollout,
    "variability": analyze.variability,
    "pool_words": lambda trace: [c.weights for c in analyze.pool_words(trace)],
    "between_labels": lambda trace: analyze.between_labels(trace, ["a", "b", *["c"] * (T - 2)]),
    "neurons": analyze.neuron_contributions,
}


@pytest.mark.usefixtures("blocks_of_two_heads")
@pytest.mark.parametrize("name", BY_HEADS)
def test_no_more_is_derived_at_once_than_a_block_of_heads(name: str, trace: hookattn.Trace) -> None:
    with derivations() as found:
        BY_HEADS[name](trace)
    assert {one.h for one in found} == {1 if name in ("compare", "variability") else 2}  # these hold several matrices
    assert sum(one.h for one in found) % HEADS == 0
    assert all(call.made == {} for call in trace), "the trace keeps nothing of it"


@pytest.mark.parametrize("name", BY_HEADS)
def test_block_by_block_it_is_what_it_is_at_once(
    name: str, trace: hookattn.Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = BY_HEADS[name](kept(trace))
    monkeypatch.setattr(call_view, "_BLOCK", 4 * B * T * T)  # of six heads four, and two
    same(BY_HEADS[name](trace), whole)


def same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, list):
        for one, other in zip(found, wanted, strict=True):
            same(one, other)
    elif isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6, equal_nan=True)
    else:
        import pandas as pd

        # Rounding may exchange heads that are as far from each other, and checks that are listed head by head.
        order = [c for c in ("call", "head", "check", "example", "query", "from", "to") if c in wanted]
        one, other = (x.sort_values(order, ignore_index=True) for x in (found, wanted))
        if "worst" in other:
            one, other = (x.drop(columns=["worst", "rows", "example", "query"]) for x in (one, other))
        if "evidence" in other:
            assert found.attrs["left_out"].keys() == wanted.attrs["left_out"].keys()
        if "jensen_shannon" in other:
            assert other["total_variation"].max() < 1e-5 and one["total_variation"].max() < 1e-5
            one, other = one[order], other[order]
        pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-5, check_exact=False)


def test_a_report_holds_one_call_at_a_time(trace: hookattn.Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    derive_field = deriving.derive_field

    def watched(call: Any, name: str) -> torch.Tensor:
        nonlocal most
        made = derive_field(call, name)
        alive.append(weakref.ref(made))
        most = max(most, sum(ref() is not None for ref in alive))
        return made

    monkeypatch.setattr("hookattn.calls.call.derive_field", watched)
    analyze.report(trace)
    assert len(alive) == LAYERS and most == 1


def test_statistics_derive_nothing(trace: hookattn.Trace) -> None:
    """Blocks of scores follow from q and k as the pass goes on."""
    with derivations() as found:
        analyze.measure(trace, ["entropy", "previous_token", "first_token", "mean_distance"])
    assert found == []


def test_of_a_causal_kernel_the_pass_sees_its_diagonal(trace: hookattn.Trace) -> None:
    made = score_inputs_of(trace[0], None)
    assert made is not None and made.scores is None and made.mask is None and made.diagonal == (True, 0, None)


def test_a_token_is_looked_up_in_its_row_alone(trace: hookattn.Trace) -> None:
    with derivations() as found:
        table = analyze.top_targets(trace, 7, example=1)
    assert found == [Derived(1, HEADS, 1, T)] * LAYERS
    for call in trace:
        best = call.weights[1, :, 7].argmax(-1)
        assert table[(table["call"] == call.index) & (table["rank"] == 1)]["key"].tolist() == best.tolist()


def test_a_neuron_of_one_query_takes_its_row(trace: hookattn.Trace) -> None:
    with derivations() as found:
        analyze.neuron_contributions(trace, query=5)
    assert found == [Derived(B, HEADS, 1, T)] * LAYERS


def test_divergence_takes_rows_of_all_heads(trace: hookattn.Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = analyze.head_divergence(trace)
    monkeypatch.setattr("hookattn.analyze.tables.divergence._PART", 5 * B * T * HEADS * LAYERS)
    with derivations() as found:
        made = analyze.head_divergence(trace)
    assert found == [Derived(B, HEADS, 5, T)] * LAYERS * (T // 5)
    torch.testing.assert_close(torch.tensor(made.to_numpy()), torch.tensor(wanted.to_numpy()), rtol=1e-5, atol=1e-6)
