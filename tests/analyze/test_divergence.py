"""Agreement of heads against scipy, and their groups."""

from __future__ import annotations

import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import jensenshannon, pdist, squareform

import hookattn
from hookattn import analyze
from hookattn.errors import FieldNotCaptured, MeasureError, SelectionError
from tests.analyze.build import CASES, Case, case, given, previous, uniform


def explicit(made: Case) -> np.ndarray:
    """scipy's distance is the root of the divergence; it divides by the sum, so a sink has to be one of its keys."""
    heads = [w[:, n] for w in made.weights for n in range(w.shape[1])]
    table = np.zeros((len(heads), len(heads)))
    for a, one in enumerate(heads):
        for b, two in enumerate(heads):
            found = []
            for i, j in made.rows.nonzero().tolist():
                p, q = (torch.cat([w[i, j], 1 - w[i, j].sum(0, True)]).clamp_min(0).numpy() for w in (one, two))
                found.append(jensenshannon(p, q) ** 2)
            table[a, b] = np.nanmean(found)
    return table


@pytest.mark.parametrize("kind", [*CASES, "cross"])
def test_divergence_is_scipys(kind: str) -> None:
    made = case(**({"cross": True, "t": 4, "s": 6, "pad": (0, 2)} if kind == "cross" else CASES[kind]))
    table = analyze.head_divergence(made.trace)
    np.testing.assert_allclose(table.to_numpy(), explicit(made), atol=3e-6)
    heads = made.trace[0].heads or (0, 1, 2, 3)
    assert table.index.tolist() == table.columns.tolist() == [(n, n, h) for n in (0, 1) for h in heads]
    assert table.index.names == ["call", "layer", "head"]


def test_divergence_within_a_layer_is_a_part_of_that_over_all() -> None:
    trace = case(layers=3, pad=(0, 4)).trace
    whole = analyze.head_divergence(trace)
    part = analyze.head_divergence(trace[1:2])
    np.testing.assert_allclose(part.to_numpy(), whole.loc[part.index, part.columns].to_numpy(), atol=1e-7)


def test_divergence_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = case(pad=(0, 3), sinks=True).trace
    whole = analyze.head_divergence(trace)
    monkeypatch.setattr(sys.modules[analyze.head_divergence.__module__], "_PART", 100)
    np.testing.assert_allclose(analyze.head_divergence(trace).to_numpy(), whole.to_numpy(), atol=1e-7)


def test_divergence_in_closed_form() -> None:
    here, back = torch.eye(5).view(1, 1, 5, 5), previous(5)
    table = analyze.head_divergence(given(torch.cat([here, back, here], 1))).to_numpy()
    assert table[0, 2] == 0 and (np.diag(table) == 0).all()
    assert table[0, 1] == pytest.approx(0.8 * math.log(2), abs=1e-6)  # the first token has but itself


def test_rows_that_count_in_all_calls() -> None:
    made = case(causal=False)
    real = torch.ones(2, 9)
    real[1, 5:] = 0
    made.rows = real.bool()
    np.testing.assert_allclose(analyze.head_divergence(made.trace, real=real).to_numpy(), explicit(made), atol=3e-6)
    with pytest.raises(MeasureError, match="and there are none"):
        analyze.head_divergence(made.trace, real=real * 0)


def test_calls_in_which_other_rows_count() -> None:
    whole, part = case(layers=1), case(layers=1, pad=(0, 3), seed=5)
    part.trace[0].index = 1
    both = hookattn.Trace(whole.trace.calls + part.trace.calls)
    part.weights = whole.weights + part.weights
    np.testing.assert_allclose(analyze.head_divergence(both).to_numpy(), explicit(part), atol=3e-6)


def test_heads_that_cannot_be_compared() -> None:
    with pytest.raises(MeasureError, match=r"heads can be compared where .* B1 T4 S4, call 1 .* B1 T5 S5"):
        analyze.head_divergence(given([uniform(4), uniform(5)]))
    with pytest.raises(FieldNotCaptured, match="weights"):
        analyze.head_divergence(case(keep=("v", "q", "k")).trace)
    with pytest.raises(MeasureError, match="no calls"):
        analyze.head_divergence(hookattn.Trace())
    w = uniform(4, 2)
    w[0, 0, 3, 0] = torch.nan
    table = analyze.head_divergence(given(w, mask=torch.ones(4, 4, dtype=torch.bool).tril()))
    assert math.isnan(table.iloc[0, 1])
    with pytest.raises(MeasureError, match="no NaN"):
        analyze.cluster_heads(table, 2)


def test_clusters() -> None:
    """Three heads near each of three patterns are three groups."""
    torch.manual_seed(0)
    kinds = [torch.eye(8).view(1, 1, 8, 8), previous(8), uniform(8)]
    heads = torch.cat([k * 0.9 + 0.1 * torch.softmax(torch.randn(8, 8), -1).tril() for k in kinds for _ in range(3)], 1)
    heads = heads / heads.sum(-1, keepdim=True)
    divergence = analyze.head_divergence(given(heads))
    for method in ("average", "complete", "single", "weighted"):
        table = analyze.cluster_heads(divergence, 3, method=method)
        groups = table.cluster.tolist()
        assert len(set(groups)) == 3 and groups == [g for g in dict.fromkeys(groups) for _ in range(3)]
        assert sorted(table.order) == list(range(9))
        for g in set(groups):  # a group is side by side among the leaves
            at = sorted(table.order[table.cluster == g])
            assert at == list(range(at[0], at[0] + 3))
    assert table.index.equals(divergence.index)
    assert analyze.cluster_heads(divergence, 1).cluster.nunique() == 1


def test_coordinates_are_those_of_points_in_the_plane() -> None:
    """Distances between points in a plane come back, whatever was turned or shifted."""
    points = np.random.default_rng(0).normal(size=(7, 2))
    index = pd.MultiIndex.from_tuples([(0, 0, h) for h in range(7)], names=["call", "layer", "head"])
    table = analyze.cluster_heads(pd.DataFrame(squareform(pdist(points)) ** 2, index, index), 2)
    np.testing.assert_allclose(pdist(table[["x", "y"]].to_numpy()), pdist(points), atol=1e-10)


def test_bad_arguments() -> None:
    divergence = analyze.head_divergence(given(uniform(4, 3)))
    with pytest.raises(SelectionError, match=r"method='ward': expected one of average"):
        analyze.cluster_heads(divergence, 2, method="ward")
    with pytest.raises(SelectionError, match=r"clusters=0: expected an int from 1"):
        analyze.cluster_heads(divergence, 0)
    with pytest.raises(MeasureError, match="1 heads; expected two or more"):
        analyze.cluster_heads(divergence.iloc[:1, :1], 1)
