"""Ranks of scores against numpy, and in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import hookattn
from hookattn import analyze
from hookattn.errors import FieldNotCaptured, MeasureError, SelectionError
from tests.analyze.build import CASES, Case, case


def matrix(made: Case, layer: int, i: int, head: int, masked: bool) -> np.ndarray:
    """The scores of the rows and keys that count, alone."""
    scores = made.trace[layer].scores[i, head].double()
    if masked:
        scores = torch.where(made.mask[i, 0], scores, 0.0)
    return scores[made.rows[i]][:, made.real[i]].numpy()


@pytest.mark.parametrize("kind", [*CASES, "cross"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keep", ["scores mask", "q k bias mask sinks"])
@pytest.mark.parametrize("d", [3, 20])
def test_ranks_are_those_of_numpy(kind: str, masked: bool, keep: str, d: int) -> None:
    options: dict[str, Any] = {"cross": True, "s": 7, "pad": (0, 3)} if kind == "cross" else CASES[kind]
    made = case(**options, d=d, keep=keep.split())
    seen = case(**options, d=d)
    table = analyze.score_rank(made.trace, masked=masked)
    values = analyze.singular_values(made.trace, masked=masked)
    for line in table.to_dict("records"):
        layer, i = line["call"], line["example"]
        n = list(made.trace[layer].heads or range(4)).index(line["head"])
        sigma = np.linalg.svd(matrix(seen, layer, i, n, masked), compute_uv=False)
        share = sigma / sigma.sum()
        energy = np.cumsum(sigma**2) / (sigma**2).sum()
        assert line["largest"] == pytest.approx(sigma[0], rel=1e-5)
        assert line["effective_rank"] == pytest.approx(
            math.exp(-sum(p * math.log(p) for p in share if p > 1e-30)), 1e-4
        )
        assert line["energy_rank"] == next(k + 1 for k, e in enumerate(energy) if e >= 0.9)
        noise = max(made.trace[layer].scores.shape[2:]) * np.finfo(np.float32).eps * sigma[0]
        assert line["rank"] == (sigma > noise).sum()
        got = values[layer][i, n].numpy()
        size = min(len(got), len(sigma))
        np.testing.assert_allclose(got[:size], sigma[:size], atol=1e-5 * sigma[0])
        assert (got[size:] < 1e-5 * sigma[0]).all() and (sigma[size:] < 1e-5 * sigma[0]).all()
        assert line["bound"] == pytest.approx(d if "q" in keep.split() and not masked else math.nan, nan_ok=True)
        if not masked:
            assert line["rank"] <= d


def test_closed_forms() -> None:
    made = case(b=1, h=1, g=1, t=5, d=5, layers=1, causal=False)
    call = made.trace[0]
    call.fields["k"] = torch.eye(5).view(1, 1, 5, 5)
    for factors, effective, energy in (
        ([1.0] * 5, 5, 5),
        ([1.0, 1, 0, 0, 0], 2, 2),
        ([9.0, 3, 0, 0, 0], math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), 1),
    ):
        call.fields["q"] = torch.diag(torch.tensor(factors)).view(1, 1, 5, 5)
        call.fields["scores"] = call.scale * call.fields["q"]
        line = analyze.score_rank(made.trace).iloc[0]
        assert line.effective_rank == pytest.approx(effective)
        assert (line.energy_rank, line["rank"]) == (energy, sum(f > 0 for f in factors))
        assert line.largest == pytest.approx(max(factors) / math.sqrt(5))
    assert analyze.score_rank(made.trace, energy=1).energy_rank[0] == 2
    call.fields["q"] = call.fields["scores"] = torch.zeros(1, 1, 5, 5)
    assert analyze.score_rank(made.trace).iloc[0][["effective_rank", "energy_rank", "rank", "largest"]].isna().all()


def test_a_bias_or_a_soft_cap_lifts_the_bound() -> None:
    for change in ("bias", "softcap", "own"):
        made = case(d=2, layers=1)
        call = made.trace[0]
        if change == "bias":
            call.fields["bias"] = torch.eye(9)
            call.fields["scores"] = call.scores + torch.eye(9)
        elif change == "softcap":
            call.softcap = 1.0
            call.fields["scores"] = torch.tanh(call.scores)
        else:
            call.own_scores = True
            call.fields["scores"] = call.scores.exp()
        table = analyze.score_rank(made.trace)
        assert table.bound.isna().all() and (table["rank"] > 2).all()


@pytest.mark.parametrize("d", [3, 20])
def test_what_is_not_finite_is_nan(d: int) -> None:
    made = case(d=d)
    for name in ("q", "scores"):
        value = made.trace[0].fields[name]
        assert isinstance(value, torch.Tensor)
        value[1, 2, 4, 0] = torch.inf
    table = analyze.score_rank(made.trace)
    bad = (table.call == 0) & (table["head"] == 2) & (table.example == 1)
    assert table[bad][["effective_rank", "energy_rank", "rank", "largest"]].isna().all().all()
    assert not table[~bad][["effective_rank", "energy_rank", "rank", "largest"]].isna().any().any()


def test_clear_errors() -> None:
    for energy in (0, 1.5):
        with pytest.raises(SelectionError, match=r"energy=.*: expected a share"):
            analyze.score_rank(case().trace, energy=energy)
    with pytest.raises(FieldNotCaptured, match="'scores'"):
        analyze.score_rank(case(keep=("weights", "mask")).trace)
    with pytest.raises(MeasureError, match="no calls"):
        analyze.score_rank(hookattn.Trace())
