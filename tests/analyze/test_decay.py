"""Distance decay, rank correlation and received attention against plain loops and scipy."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import hookattn
from hookattn import analyze
from hookattn.errors import FieldNotCaptured, MeasureError
from tests.analyze.build import CASES, Case, case, given, previous, uniform


def pairs(made: Case) -> list[tuple[int, int, int]]:
    """Each example, query and key that count together."""
    b, _, t, s = made.mask.shape
    return [
        (i, j, k)
        for i in range(b)
        for j in range(t)
        for k in range(s)
        if made.rows[i, j] and made.mask[i, 0, j, k] and made.real[i, k]
    ]


# -------------------------------------------------------------------------------------------------------- decay


@pytest.mark.parametrize("kind", CASES)
def test_decay_is_the_mean_of_all_pairs_at_a_distance(kind: str) -> None:
    made = case(**CASES[kind])
    table = analyze.distance_decay(made.trace)
    for layer, weights in enumerate(made.weights):
        heads = made.trace[layer].heads or range(weights.shape[1])
        for n, head in enumerate(heads):
            found: dict[int, list[float]] = {}
            for i, j, k in pairs(made):
                found.setdefault(int(made.positions[j]) - k, []).append(float(weights[i, n, j, k]))
            part = table[(table.call == layer) & (table["head"] == head)]
            assert part.distance.tolist() == sorted(found)
            assert part["count"].tolist() == [len(found[d]) for d in sorted(found)]
            assert part.weight.tolist() == pytest.approx([np.mean(found[d]) for d in sorted(found)], abs=1e-6)


def test_decay_in_closed_form() -> None:
    table = analyze.distance_decay(given(uniform(6)))
    expected = [np.mean([1 / (i + 1) for i in range(d, 6)]) for d in range(6)]
    assert table.weight.tolist() == pytest.approx(expected)
    table = analyze.distance_decay(given(previous(6)))
    assert table.weight.tolist() == pytest.approx([1 / 6, 1, 0, 0, 0, 0])


def test_decay_leaves_out_what_is_said_to_be_padding() -> None:
    made = case(causal=False)
    made.real[1, 5:] = False
    made.rows = made.real
    table = analyze.distance_decay(made.trace, real=made.real)
    at = table[(table.call == 1) & (table["head"] == 2) & (table.distance == -3)]
    found = [float(made.weights[1][i, 2, j, j + 3]) for i, j, k in pairs(made) if k == j + 3]
    assert at.weight.item() == pytest.approx(np.mean(found), abs=1e-6) and at["count"].item() == len(found) == 6 + 2


# --------------------------------------------------------------------------------------------- rank correlation


def spearman(made: Case, layer: int, i: int, head: int, j: int) -> float:
    keys = [k for k in range(made.mask.shape[3]) if made.mask[i, 0, j, k] and made.real[i, k]]
    far = [abs(int(made.positions[j]) - k) for k in keys]
    # float32, so that what is tied there is tied here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(stats.spearmanr(far, made.weights[layer][i, head, j, keys].float()).statistic)


def check_rank(made: Case) -> None:
    table = analyze.DistanceCorrelation()(made.trace, by="query")
    for layer, weights in enumerate(made.weights):
        b, h, t, _ = weights.shape
        got = table[table.call == layer].distance_correlation.to_numpy().reshape(b, h, t)
        for i in range(b):
            for head in range(h):
                for j in range(t):
                    expected = math.nan
                    if made.rows[i, j] and int(made.mask[i, 0, j].sum()) > 1:
                        expected = spearman(made, layer, i, head, j)
                    assert got[i, head, j] == pytest.approx(expected, abs=2e-6, nan_ok=True)
        means = analyze.DistanceCorrelation()(made.trace[layer : layer + 1]).distance_correlation
        for head in range(h):
            own = got[:, head][~np.isnan(got[:, head])]
            assert means[head] == pytest.approx(own.mean() if len(own) else math.nan, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("kind", CASES)
def test_rank_correlation_is_scipys(kind: str) -> None:
    check_rank(case(**CASES[kind]))


@pytest.mark.parametrize("causal", [True, False])
def test_rank_correlation_with_ties(causal: bool) -> None:
    made = case(t=24, causal=causal, pad=(0, 5), keep=("weights", "mask"))
    for layer, call in enumerate(made.trace):
        coarse = (made.weights[layer] * 8).round() / 8
        call.fields["weights"] = coarse.float()
        made.weights[layer] = coarse
        assert len(coarse.unique()) < 10
    check_rank(made)


def test_rank_correlation_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case(t=30, pad=(3, 0))
    whole = analyze.DistanceCorrelation()(made.trace).distance_correlation
    monkeypatch.setattr(sys.modules[analyze.DistanceCorrelation.__module__], "_PART", 1000)
    parts = analyze.DistanceCorrelation()(made.trace).distance_correlation
    assert parts.tolist() == pytest.approx(whole.tolist(), rel=1e-6)


def test_rank_correlation_in_closed_form() -> None:
    s = 7
    near = torch.ones(s, s).tril() * torch.arange(1, s + 1)
    near = (near / near.sum(-1, keepdim=True)).expand(1, 1, s, s)
    assert analyze.DistanceCorrelation()(given(near)).distance_correlation[0] == pytest.approx(-1)
    table = analyze.DistanceCorrelation()(given(uniform(5)))
    assert table.distance_correlation.isna().all()
    near = near.clone()
    near[0, 0, 3, 1] = math.nan
    assert analyze.DistanceCorrelation()(given(near)).distance_correlation.isna().all()


# ----------------------------------------------------------------------------------------------------- received


@pytest.mark.parametrize("kind", [*CASES, "cross"])
@pytest.mark.parametrize("keep", ["weights mask", "q k mask bias sinks"])
def test_received(kind: str, keep: str) -> None:
    options = {"cross": True, "t": 5, "s": 8, "pad": (0, 3)} if kind == "cross" else CASES[kind]
    made = case(**options, keep=keep.split())
    if kind == "cross":
        made.rows[:] = True
    table = analyze.received(made.trace)
    for layer, weights in enumerate(made.weights):
        heads = list(made.trace[layer].heads or range(weights.shape[1]))
        part = table[table.call == layer]
        assert len(part) == len(heads) * int(made.real.sum())
        for line in part.to_dict("records"):
            i, n, k = line["example"], heads.index(line["head"]), line["key"]
            rows = [j for j in range(weights.shape[2]) if made.rows[i, j]]
            total = sum(float(weights[i, n, j, k]) for j in rows)
            count = sum(bool(made.mask[i, 0, j, k]) for j in rows)
            assert line["sum"] == pytest.approx(total, abs=2e-5)
            assert line["queries"] == count
            assert line["mean"] == pytest.approx(total / count if count else math.nan, abs=2e-5, nan_ok=True)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.view(*x.shape[:2], 2, -1).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def test_received_beside_the_kernel() -> None:
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1))
    tokens = [[f"{i}{j}" for j in range(9)] for i in "ab"]
    whole = analyze.received(hookattn.trace(Attention(), x, tokens=tokens))
    lean = hookattn.trace(Attention(), x, tokens=tokens, capture=("received", "lse"))
    table = analyze.received(lean)
    assert table["sum"].tolist() == pytest.approx(whole["sum"].tolist(), abs=1e-6)
    assert table.token.tolist() == whole.token.tolist() == (tokens[0] + tokens[1]) * 2
    assert table["mean"].isna().all() and not whole["mean"].isna().any()
    masked = analyze.received(hookattn.trace(Attention(), x, capture=("received", "lse", "mask")))
    assert masked["mean"].tolist() == pytest.approx(whole["mean"].tolist(), abs=1e-6)
    with pytest.raises(FieldNotCaptured, match="or with a statistic of each query"):
        analyze.received(hookattn.trace(Attention(), x, capture=("received",)))
    with pytest.raises(FieldNotCaptured, match="'weights'"):  # a column sum has the padded rows in it
        analyze.received(lean, real=torch.ones(2, 9).tril(7))


# ---------------------------------------------------------------------------------------------------- bad input


def test_clear_errors() -> None:
    crossed = case(cross=True).trace
    for of in (analyze.distance_decay, analyze.DistanceCorrelation()):
        function: Any = of
        with pytest.raises(MeasureError, match=r"call 0 \(layers.0.attn, step 0\)"):
            function(crossed)
        with pytest.raises(FieldNotCaptured, match="'mask'"):
            function(case(keep=("weights",)).trace)
    for function in (analyze.distance_decay, analyze.received):
        with pytest.raises(MeasureError, match="no calls"):
            function(hookattn.Trace())
