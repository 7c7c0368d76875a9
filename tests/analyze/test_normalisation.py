"""What is wrong with weights is found, and nothing else."""

from __future__ import annotations

import pytest
import torch

import hookattn
from hookattn import analyze
from hookattn.errors import FieldNotCaptured, MeasureError
from tests.analyze.build import CASES, case, given, uniform


@pytest.mark.parametrize("kind", [*CASES, "cross"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_nothing_is_wrong(kind: str, dtype: torch.dtype) -> None:
    made = case(**({"cross": True, "pad": (0, 3)} if kind == "cross" else CASES[kind]), dtype=dtype)
    assert analyze.normalisation(made.trace).empty
    if kind != "sinks":
        assert analyze.normalisation(case(**({} if kind == "cross" else CASES[kind]), keep=("weights",)).trace).empty


def test_each_fault_is_found_where_it_is() -> None:
    made = case(b=2, heads=(3, 0, 2, 1), queries=(1, 4, 8), layers=1)
    w = made.trace[0].fields["weights"]
    assert isinstance(w, torch.Tensor)
    w[1, 0, 2, 0] += 0.25  # head 3, query 8
    w[0, 0, 1, 1] += 0.125
    w[0, 1, 0, 0] -= 1  # head 0, query 1
    w[0, 1, 0, 1] += 1
    low = float(w[0, 1, 0].min())
    w[1, 2, 1, 8] = 1e-6  # head 2, query 4: a key that it may not see
    w[0, 3, 2, 3] = torch.nan  # head 1, query 8
    table = analyze.normalisation(made.trace)
    found = {
        (line["head"], line["check"]): (line["rows"], pytest.approx(line["worst"]), line["example"], line["query"])
        for line in table.to_dict("records")
    }
    assert low < 0
    assert found == {
        (3, "row_sum"): (2, 0.25, 1, 8),
        (0, "negative"): (1, -low, 0, 1),
        (2, "masked"): (1, 1e-6, 1, 4),
        (1, "non_finite"): (1, torch.inf, 0, 8),
    }


def test_sinks_take_their_share() -> None:
    made = case(sinks=True, layers=1)
    assert analyze.normalisation(made.trace).empty
    w = made.trace[0].fields["weights"]
    assert isinstance(w, torch.Tensor)
    w[0, 0, 3, 0] += 1
    assert analyze.normalisation(made.trace).check.tolist() == ["row_sum"]
    lacking = analyze.normalisation(case(sinks=True, keep=("weights", "mask")).trace)
    assert set(lacking.check) == {"row_sum"} and len(lacking) == 8


def test_rows_with_nothing_to_attend_to_may_be_anything() -> None:
    made = case(pad=(2, 0), side="left", layers=1)
    w = made.trace[0].fields["weights"]
    assert isinstance(w, torch.Tensor)
    w[0, :, :2] = 1 / 9
    assert analyze.normalisation(made.trace).empty
    w[0, 2, 1, 1] = torch.inf
    assert analyze.normalisation(made.trace).check.tolist() == ["non_finite"]


def test_the_tolerance() -> None:
    w = uniform(4)
    w[0, 0, 3, 0] += 1e-3
    assert analyze.normalisation(given(w)).worst.item() == pytest.approx(1e-3, rel=1e-3)
    assert analyze.normalisation(given(w), tolerance=2e-3).empty
    assert analyze.normalisation(given(w.half())).empty


def test_clear_errors() -> None:
    with pytest.raises(FieldNotCaptured, match="weights"):
        analyze.normalisation(case(keep=("q",)).trace)
    with pytest.raises(MeasureError, match="no calls"):
        analyze.normalisation(hookattn.Trace())
