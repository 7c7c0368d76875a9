"""The distance of two traces, against scipy and loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

import hookattn
from hookattn.analyze.tables.compare import compare
from hookattn.errors import FieldNotCaptured, MeasureError
from tests.analyze.build import CASES, case, given, uniform

KINDS: dict[str, dict[str, Any]] = {**CASES, "cross": {"cross": True, "s": 7}}


@pytest.mark.parametrize("kind", KINDS)
def test_against_scipy_row_by_row(kind: str) -> None:
    one, two = case(**KINDS[kind]), case(**KINDS[kind], seed=100)
    table = compare(one.trace, two.trace, real=one.real)
    assert table["total_variation"].is_monotonic_decreasing
    for i, (p, q) in enumerate(zip(one.weights, two.weights, strict=True)):
        call = one.trace[i]
        for y in range(p.shape[1]):
            rows = [(x, r) for x in range(len(p)) for r in range(p.shape[2]) if one.rows[x, r]]
            tv, js, most = [], [], 0.0
            for x, r in rows:
                a, b = ([*w[x, y, r].tolist(), max(0.0, 1 - float(w[x, y, r].sum()))] for w in (p, q))
                tv.append(sum(abs(s - t) for s, t in zip(a, b, strict=True)) / 2)
                js.append(0.0 if np.allclose(a, b, atol=1e-12) else jensenshannon(a, b) ** 2)
                most = max(most, *(abs(s - t) for s, t in zip(a, b, strict=True)))
            oa, ob = (torch.stack([t[i].output[x, y, r].double() for x, r in rows]) for t in (one.trace, two.trace))
            number = y if call.heads is None else call.heads[y]
            mine = table[(table["call"] == i) & (table["head"] == number)].iloc[0]
            assert mine["total_variation"] == pytest.approx(np.mean(tv), abs=1e-6)
            assert mine["jensen_shannon"] == pytest.approx(np.mean(js), abs=1e-6)
            assert mine["max_difference"] == pytest.approx(most, abs=1e-6)
            assert mine["output_difference"] == pytest.approx(float((oa - ob).norm() / oa.norm()), rel=1e-4)


def test_one_trace_with_itself_and_with_its_opposite() -> None:
    made = case(sinks=True)
    same = compare(made.trace, made.trace)
    columns = ["total_variation", "jensen_shannon", "max_difference", "output_difference"]
    assert (same[columns] == 0).all().all()
    first, last = torch.zeros(1, 2, 5, 5), torch.zeros(1, 2, 5, 5)
    first[..., 0], last[..., -1] = 1, 1
    apart = compare(given(first, torch.ones(5, 5).bool()), given(last, torch.ones(5, 5).bool()))
    assert apart["total_variation"].tolist() == [1.0, 1.0]
    assert apart["jensen_shannon"].tolist() == pytest.approx([math.log(2)] * 2)
    assert apart["max_difference"].tolist() == [1.0, 1.0]
    assert apart["output_difference"].isna().all()


def test_only_rows_that_count_in_both() -> None:
    left, right = case(layers=1, pad=(0, 3)), case(layers=1, pad=(0, 3), seed=9)
    clean = compare(left.trace, right.trace)
    spoilt = right.trace[0].weights.clone()
    spoilt[1, :, -3:] = torch.nan
    right.trace[0].fields["weights"] = spoilt
    columns = ["total_variation", "jensen_shannon", "max_difference"]
    assert (compare(left.trace, right.trace)[columns] == clean[columns]).all().all()
    spoilt[0, 2, 4] = torch.nan
    table = compare(left.trace, right.trace).set_index("head")
    assert table.loc[2, columns].isna().all() and table.loc[[0, 1, 3], columns].notna().all().all()


def test_two_kernels_of_one_model() -> None:
    tm = pytest.importorskip("tests.tiny_models")
    inputs = tm.padded("right")
    eager, fused = (hookattn.trace(tm.gpt2(kind), inputs) for kind in ("eager", "sdpa"))
    table = compare(eager, fused)
    assert len(table) == 8
    assert table["total_variation"].max() < 1e-5 and table["output_difference"].max() < 1e-5
    other = compare(eager, hookattn.trace(tm.gpt2(), {**inputs, "input_ids": inputs["input_ids"].flip(1)}))
    assert other["total_variation"].min() > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 1}, "one has 2 calls and the other 1"),
        ({"t": 8}, r"B H T S of call 0 .* is \(2, 4, 9, 9\), and of the other's .* \(2, 4, 8, 8\)"),
        ({"h": 2}, r"B H T S .*\(2, 2, 9, 9\)"),
        ({"cross": True}, "kind of call 0 .* is self, and of the other's .* cross"),
        ({"b": 1}, r"B H T S .*\(1, 4, 9, 9\)"),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MeasureError, match=message):
        compare(case().trace, case(**options).trace)


def test_other_heads_and_queries_do_not_fit() -> None:
    for option in ("heads", "queries"):
        with pytest.raises(MeasureError, match=rf"{option} of call 0 .* is \[0, 1\], and of the other's .* \[0, 2\]"):
            compare(case(**{option: (0, 1)}).trace, case(**{option: (0, 2)}).trace)
    with pytest.raises(MeasureError, match=r"path of call 0 .* is other, and of the other's"):
        compare(given(uniform(5), path="other"), given(uniform(5)))
    with pytest.raises(FieldNotCaptured):
        compare(case(keep=("v",)).trace, case().trace)
    with pytest.raises(MeasureError, match="no calls"):
        compare(hookattn.Trace(), hookattn.Trace())
