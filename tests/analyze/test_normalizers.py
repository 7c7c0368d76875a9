"""Weights that are no softmax are never taken for shares in silence; those that are a distribution all the same are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn import analyze
from hookattn.errors import FieldAbsent, HookattnError, MeasureError
from tests.analyze.build import case

B, H, T = 2, 3, 7


def entropy_of(weights: Tensor) -> list[float]:
    """H: the mean over examples and queries."""
    mean: list[float] = torch.special.entr(weights).sum(-1).mean((0, 2)).tolist()
    return mean


def made(normalizer: str, seed: int = 0) -> tuple[hookattn.Trace, Tensor]:
    """A causal trace of one call without q, k and scores, and its weights in float64."""
    scores = torch.randn(B, H, T, T, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    hidden = scores.masked_fill(~mask, -torch.inf)
    top = hidden.softmax(-1).where(hidden.softmax(-1) > 0.1, 0)
    weights = {
        "sigmoid": hidden.sigmoid(),
        "relu": hidden.relu(),
        "differential": 1.5 * hidden.softmax(-1) - (2 * hidden).softmax(-1),
        "entmax": top / top.sum(-1, keepdim=True),
        "sparsemax": top / top.sum(-1, keepdim=True),
    }[normalizer]
    trace = case(B, H, H, T, layers=1).trace
    call = trace.calls[0]
    fields = {"q": None, "k": None, "scores": None, "weights": weights.float(), "mask": mask[None, None]}
    fields |= {name: call.fields[name] for name in ("v", "bias", "sinks", "output")} | {"applied": None}
    kept = {name: fields[name] for name in ("q", "k", "v", "bias", "scores", "mask", "sinks", "weights", "applied")}
    own = {"normalizer": normalizer, "score": "additive", "own_scores": True, "scale": None, "derivable": ()}
    trace.calls = [replace(call, fields=kept, **own)]
    return trace, weights


NAMES = ("entropy", "confidence", "first_token", "previous_token", "mean_distance", "learned_sink")
NONE = ("sigmoid", "relu", "differential")


@pytest.mark.parametrize("normalizer", NONE)
@pytest.mark.parametrize("name", NAMES)
def test_a_measure_of_shares_says_that_it_is_not_defined(normalizer: str, name: str) -> None:
    trace, _ = made(normalizer)
    with pytest.raises(MeasureError, match=f"normalizer is '{normalizer}'.*as_distribution"):
        analyze.measure(trace, name)
    assert analyze.measure(trace, name, missing=True)[name].isna().all()


@pytest.mark.parametrize("normalizer", NONE)
def test_their_magnitudes_are_measured_as_a_distribution(normalizer: str) -> None:
    trace, weights = made(normalizer)
    shares = weights.abs() / weights.abs().sum(-1, keepdim=True).clamp_min(1e-30)
    found = analyze.measure(analyze.as_distribution(trace), ["entropy", "first_token"])
    assert found["entropy"].tolist() == pytest.approx(entropy_of(shares), rel=1e-5)
    assert found["first_token"].tolist() == pytest.approx(shares[..., 0].mean((0, 2)).tolist(), rel=1e-5)


@pytest.mark.parametrize("normalizer", ["sparsemax", "entmax"])
def test_a_distribution_is_measured_as_it_is(normalizer: str) -> None:
    trace, weights = made(normalizer)
    found = analyze.measure(trace, ["entropy", "confidence", "previous_token"])
    assert found["entropy"].tolist() == pytest.approx(entropy_of(weights), rel=1e-5)
    assert found["confidence"].tolist() == pytest.approx(weights.amax(-1).mean((0, 2)).tolist(), rel=1e-5)
    before = weights.diagonal(-1, -2, -1).sum(-1).mean(0) / T
    assert found["previous_token"].tolist() == pytest.approx(before.tolist(), rel=1e-5)
    assert analyze.normalisation(trace).empty


def test_a_distribution_that_has_its_scores_too_is_not_taken_for_their_softmax() -> None:
    trace, weights = made("sparsemax")
    call = trace.calls[0]
    call.fields["scores"] = torch.randn(B, H, T, T)
    found = analyze.measure(trace, "entropy")["entropy"]
    assert found.tolist() == pytest.approx(entropy_of(weights), rel=1e-5)


def test_softmax_with_one_more_has_what_its_one_takes() -> None:
    trace = case(B, H, H, T, layers=1).trace
    call = trace.calls[0]
    call.normalizer = "softmax1"
    scores = call.scores.double().masked_fill(~call.mask, -torch.inf)
    weights = scores.exp() / (1 + scores.exp().sum(-1, keepdim=True))
    call.fields |= {"weights": weights.float()}
    found = analyze.measure(trace, ["entropy", "first_token"])
    assert found["entropy"].tolist() == pytest.approx(entropy_of(weights), rel=1e-5)
    assert found["first_token"].tolist() == pytest.approx(weights[..., 0].mean((0, 2)).tolist(), rel=1e-5)
    assert analyze.normalisation(trace).empty


def test_what_met_the_values_is_measured_where_it_is_asked_for() -> None:
    trace, _ = made("sigmoid")
    applied = torch.rand(B, H, T, T).tril()
    trace.calls[0].fields["applied"] = applied
    found = analyze.as_distribution(trace, "applied")[0].weights
    torch.testing.assert_close(found, applied / applied.sum(-1, keepdim=True))


@pytest.mark.parametrize("normalizer", NONE)
def test_tables_of_any_weights_and_tables_of_shares(normalizer: str) -> None:
    trace, weights = made(normalizer)
    decay = analyze.distance_decay(trace)
    first = decay[(decay["head"] == 0) & (decay["distance"] == 1)]["weight"].item()
    assert first == pytest.approx(weights[:, 0].diagonal(-1, -2, -1).mean().item(), rel=1e-5)
    got = analyze.received(trace)
    assert got["sum"].tolist() == pytest.approx(weights.sum(-2).transpose(0, 1).flatten().tolist(), rel=1e-4, abs=1e-6)
    assert analyze.normalisation(trace).empty  # no sum is wrong, and of what nobody knows no sign
    for table in (lambda x: analyze.compare(x, x), analyze.head_divergence):
        with pytest.raises(MeasureError, match="as_distribution"):
            table(trace)
    if normalizer == "differential":
        with pytest.raises(MeasureError, match="negative"):
            analyze.rollout(trace, heads="min")
    else:
        assert analyze.rollout(trace).isfinite().all()
    analyze.rollout(analyze.as_distribution(trace))
    assert analyze.variability(trace)["variability"].between(0, 1).all()


def test_a_sigmoid_is_not_negative_and_a_sparsemax_sums_to_one() -> None:
    trace, _ = made("sigmoid")
    trace.calls[0].fields["weights"][0, 0, 3, 1] = -0.1  # type: ignore[index]
    assert analyze.normalisation(trace).check.tolist() == ["negative"]
    trace, _ = made("sparsemax")
    trace.calls[0].fields["weights"][0, 0, 3, 1] += 0.1  # type: ignore[index,operator]
    assert analyze.normalisation(trace).check.tolist() == ["row_sum"]


def test_what_is_made_of_queries_and_keys_says_that_there_are_none() -> None:
    trace, _ = made("sigmoid")
    with pytest.raises(MeasureError, match=r"no product of queries and keys.*'additive'"):
        analyze.neuron_contributions(trace)
    with pytest.raises(MeasureError, match="no product of queries and keys"):
        analyze.neuron_decay(trace)
    with pytest.raises(FieldAbsent, match="no product of queries and keys"):
        analyze.score_rank(trace)


def test_a_report_has_what_is_defined_and_says_what_is_not() -> None:
    trace, _ = made("sigmoid")
    table = analyze.report(trace)
    assert "value_norm" in table and "entropy" not in table
    assert "as_distribution" in table.attrs["left_out"]["entropy"]
    assert (table["role"] == "").all()
    with pytest.raises(HookattnError, match="nothing can be measured"):
        analyze.report(trace, ["entropy"])


def test_values_are_weighed_by_magnitude() -> None:
    trace, weights = made("differential")
    v = trace[0].v.double()
    expected = torch.einsum("bhts,bhs->bht", weights.abs(), v.norm(dim=-1)).mean((0, 2))
    assert analyze.measure(trace, "value_norm")["value_norm"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
