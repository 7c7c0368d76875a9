"""How what was measured becomes a certificate: each error against the bound that it has, and NaN within none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hookattn import KernelCall
from hookattn.attention.masks import Diagonal
from hookattn.calls.certificate import TOLERANCE, Certificate
from hookattn.calls.mask_rule import MaskRule
from hookattn.recording.verification import (
    ALL,
    SAMPLE,
    Maxima,
    Measurement,
    kept_row_indices,
    max_abs,
    measure,
    measurement_of_maxima,
    read_certificates,
    rows_to_check,
    score_rounding,
    tolerance_of,
)
from tests.reference import draw

UNIT = 2.0**-10


def certified(
    outputs: list[float],
    values: list[float],
    row_sums: float = 0.0,
    weights: float | None = None,
    scores: float | None = None,
    sizes: float | None = None,
    rounding: float = 0.0,
) -> Certificate:
    """Of one call whose maxima are these."""

    def row(x: list[float] | float | None) -> Tensor | None:
        return None if x is None else torch.tensor([x if isinstance(x, list) else [x]], dtype=torch.float64)

    maxima = Maxima(row(row_sums), row(weights), row(scores), row(outputs), row(values), row(sizes))
    measured = Measurement.of(maxima, UNIT, 3, 7, "what was meant", rounding)  # type: ignore[arg-type]
    ((found,),) = read_certificates([measured])
    assert (found.rows, found.of_rows, found.basis) == (3, 7, "what was meant")
    return found


def status(*args: Any, **options: Any) -> str:
    return certified(*args, **options).status


# ---------------------------------------------------------------------------------------------------- one call


def test_each_error_is_good_up_to_its_bound_and_no_further() -> None:
    over = 1 + 2.0**-20
    assert status([4 * UNIT], [4.0]) == "faithful" and status([4 * UNIT * over], [4.0]) == "unfaithful"
    assert status([0.0], [4.0], weights=UNIT) == "faithful"
    assert status([0.0], [4.0], weights=UNIT * over) == "unfaithful"
    assert status([0.0], [4.0], row_sums=4 * UNIT) == "faithful"
    assert status([0.0], [4.0], row_sums=4 * UNIT * over) == "unfaithful"


def test_weights_larger_than_one_are_held_against_the_largest_and_small_ones_against_one() -> None:
    for size, bound in ((8.0, 8 * UNIT), (0.25, UNIT)):
        found = certified([0.0], [1.0], weights=bound, sizes=size)
        assert found.faithful and found.weights_tolerance == bound
        assert status([0.0], [1.0], weights=bound * 1.001, sizes=size) == "unfaithful"


def test_no_head_is_held_to_less_than_a_thousandth() -> None:
    for values in ([0.0], [1e-9], []):
        found = certified([UNIT * 1e-3], values)
        assert found.faithful and found.tolerance == UNIT * 1e-3
        assert status([UNIT * 1.01e-3], values) == "unfaithful"


@pytest.mark.parametrize("worst", range(6))
def test_query_heads_are_held_against_the_values_of_their_own_key_head(worst: int) -> None:
    """Six heads on three key heads: the one that is furthest beyond its bound is told, with that bound."""
    values = [1.0, 16.0, 0.0625]
    bounds = [UNIT * values[i // 2] for i in range(6)]
    errors = [bound / 2 for bound in bounds]
    assert status(errors, values) == "faithful"
    errors[worst] = bounds[worst] * 1.5
    found = certified(errors, values)
    assert (found.status, found.output_error, found.tolerance) == ("unfaithful", errors[worst], bounds[worst])
    errors[worst] = bounds[worst] * 0.75
    found = certified(errors, values)
    assert (found.status, found.output_error, found.tolerance) == ("faithful", errors[worst], bounds[worst])


def test_one_error_of_all_heads_is_held_against_the_largest_values() -> None:
    found = certified([3 * UNIT], [1.0, 4.0, 2.0])
    assert found.faithful and found.tolerance == 4 * UNIT


@pytest.mark.parametrize("place", range(4))
def test_a_nan_is_worse_than_anything_and_within_no_bound(place: int) -> None:
    errors = [0.0, 100.0, 0.0, 100.0]
    errors[place] = math.nan
    found = certified(errors, [1.0, 1.0])
    assert found.status == "unfaithful" and math.isnan(found.output_error)
    assert status([0.0], [1.0], weights=math.nan) == status([0.0], [1.0], row_sums=math.nan) == "unfaithful"


def test_large_scores_are_allowed_for_only_where_that_is_needed() -> None:
    allowed = {"scores": 100.0, "rounding": UNIT / 50}  # two units more
    within = certified([0.5 * UNIT], [1.0], **allowed)
    assert within.faithful and within.tolerance == UNIT, "as tight as can be"
    needs = certified([2.9 * UNIT], [1.0], **allowed)
    assert needs.faithful and needs.tolerance == pytest.approx(3 * UNIT)
    assert status([3.1 * UNIT], [1.0], **allowed) == "unfaithful"
    assert status([0.0], [1.0], weights=2.9 * UNIT, **allowed) == "faithful"
    for scores in (None, math.inf, math.nan):  # no allowance that is boundless, and none for what is not there
        found = certified([2.9 * UNIT], [1.0], scores=scores, rounding=UNIT / 50)
        assert found.status == "unfaithful" and found.tolerance == UNIT


# ---------------------------------------------------------------------------------------------------- several


def test_calls_that_were_measured_together_get_their_own_numbers() -> None:
    """Columns that are there and columns that aren't, of two measurements with two and three calls."""
    two = Maxima(
        torch.tensor([[0.1], [0.2]]),
        torch.tensor([[0.3], [0.4]]),
        None,
        torch.tensor([[0.5, 0.6], [0.7, 0.6]]),
        torch.ones(2, 2),
    )
    three = Maxima(
        torch.tensor([[0.0], [0.0], [3.0]]),
        None,
        torch.zeros(3, 1),
        torch.tensor([[1.0], [2.0], [0.0]]),
        torch.ones(3, 1),
    )
    double = Maxima(*(None if x is None else x.double() * 2 for x in three))
    measured = [Measurement.of(two, 1.0, 1, 1), Measurement.of(three, 1.5, 2, 3), Measurement.of(double, 4.5, 2, 3)]
    first, second, third = read_certificates(measured)
    assert [c.row_sum_error for c in first] == pytest.approx([0.1, 0.2])
    assert [c.weights_error for c in first] == pytest.approx([0.3, 0.4])
    assert [c.output_error for c in first] == pytest.approx([0.6, 0.7])
    assert [(c.row_sum_error, c.weights_error, c.output_error, c.status) for c in second] == [
        (0.0, None, 1.0, "faithful"),
        (0.0, None, 2.0, "unfaithful"),
        (3.0, None, 0.0, "faithful"),
    ]
    assert [(c.row_sum_error, c.output_error, c.faithful) for c in third] == [
        (0.0, 2.0, True),
        (0.0, 4.0, True),
        (6.0, 0.0, True),
    ]


# ---------------------------------------------------------------------------------------------------- what is measured


def call(b: int = 2, h: int = 4, g: int = 2, t: int = 5, s: int = 6, **more: Any) -> KernelCall:
    q, k, v = draw(b, h, t, 8, seed=1), draw(b, g, s, 8, seed=2), draw(b, g, s, 3, seed=3)
    weights = (q @ k.repeat_interleave(h // g, 1).mT * 0.3).softmax(-1)
    return KernelCall(q, k, v, weights @ v.repeat_interleave(h // g, 1), 0.3, "tap", **more)


def rule(one: KernelCall) -> MaskRule:
    t, s = one.shape[2:]
    return MaskRule(None, t, s, Diagonal(False, 0, None), torch.device("cpu"))


def certificate_of(one: KernelCall, full: bool = True) -> Certificate:
    return read_certificates([measure(one, rule(one), full)])[0][0]


@pytest.mark.parametrize("head", range(4))
@pytest.mark.parametrize("batch", range(2))
def test_errors_are_of_the_head_that_is_furthest_off(batch: int, head: int) -> None:
    one = call()
    assert one.output is not None and certificate_of(one).faithful
    one.output[batch, head, 3, 1] += 0.25
    found = certificate_of(one)
    assert found.output_error == pytest.approx(0.25, abs=1e-5)
    largest = (one.q @ one.k.repeat_interleave(2, 1).mT * 0.3).abs().max().item()
    unit = TOLERANCE[torch.float32] + score_rounding(torch.float32, False) * largest
    assert found.tolerance == pytest.approx(unit * one.v[batch, head // 2].abs().max().item(), rel=1e-4)


def test_weights_that_the_model_formed_are_held_against_those_derived_and_their_sums_against_one() -> None:
    one = call()
    right = (one.q @ one.k.repeat_interleave(2, 1).mT * 0.3).softmax(-1)
    one.weights = right.clone()
    assert certificate_of(one).faithful
    one.weights[1, 2, 4, 0] += 0.125
    found = certificate_of(one)
    assert found.weights_error == pytest.approx(0.125, abs=1e-5) and found.row_sum_error == pytest.approx(
        0.125, abs=1e-5
    )
    one.weights[1, 2, 4, 0] -= 0.375
    found = certificate_of(one)
    assert found.weights_error == pytest.approx(0.25, abs=1e-5) and found.row_sum_error == pytest.approx(0.25, abs=1e-5)


def test_what_the_output_was_compared_with() -> None:
    one = call()
    assert one.output is not None
    right, one.output = one.output, one.output + 9
    one.undropped = right
    assert certificate_of(one).faithful and certificate_of(one).basis == "the kernel rerun without dropout"
    one.outer_error = torch.tensor(0.5)
    found = certificate_of(one)
    assert (found.output_error, found.basis) == (0.5, "what the fused layer returned")
    one.output = one.undropped = one.outer_error = None
    found = certificate_of(one)
    assert (found.output_error, found.basis) == (0.0, "nothing: the kernel's output was not seen")


def test_values_of_one_batch_entry_serve_all() -> None:
    one = call(b=2)
    one.v, weights = one.v[:1], (one.q @ one.k.repeat_interleave(2, 1).mT * 0.3).softmax(-1)
    one.output = weights @ one.v.repeat_interleave(2, 1)
    assert certificate_of(one).faithful
    one.output[1, 3] += 1
    assert not certificate_of(one).faithful


@pytest.mark.parametrize("sizes", [(1, 3, 11, 5), (2, 4, 9, 7)])
def test_maxima_that_a_kernel_found(sizes: tuple[int, int, int, int]) -> None:
    """4, B·H: excess of row sums, largest score, largest error and largest value."""
    one = call(sizes[0], 4, 2, sizes[2], sizes[3])
    n = sizes[0] * 4
    found = torch.stack([torch.arange(n) * 1e-6, torch.arange(n) * 2.0, torch.arange(n) * 1e-5, torch.ones(n)])
    found[3, 2] = 4.0  # of a query head of the second key head
    measured = measurement_of_maxima(one, slice(2, None, 3), found)
    assert measured.unit == TOLERANCE[torch.float32] and measured.of_rows == sizes[2]
    assert measured.rows == len(range(2, sizes[2], 3)) and measured.rounding == score_rounding(torch.float32, False)
    assert measured.widths == [1, None, 1, n, n // 2, None]
    excess, score, *rest = measured.packed[0].tolist()
    assert excess == pytest.approx((n - 1) * 1e-6) and score == (n - 1) * 2.0
    assert rest[:n] == pytest.approx([i * 1e-5 for i in range(n)])
    assert rest[n:] == [4.0 if i == 1 else 1.0 for i in range(n // 2)]
    one.k = one.k.repeat_interleave(2, 1)  # each head has its own
    assert measurement_of_maxima(one, slice(0, 1), found).packed[0, -n:].tolist() == found[3].tolist()


# ---------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("t", [1, SAMPLE, SAMPLE + 1, 2 * SAMPLE, 2 * SAMPLE + 1, 1000])
def test_rows_are_left_out_only_of_calls_with_many_scores(t: int) -> None:
    whole = slice(0, t, 1)
    assert rows_to_check(t, True, ALL + 1) == rows_to_check(t, False, ALL) == whole
    some = range(t)[rows_to_check(t, False, ALL + 1)]
    assert some == range(t)[rows_to_check(t, False)]
    assert some[-1] == t - 1 and len(some) <= SAMPLE and (t > SAMPLE or len(some) == t)
    assert some.step == -(-t // SAMPLE) and some[0] < some.step, "no more than a step is left out at the start"


def test_the_largest_size_over_what_counts() -> None:
    x = torch.tensor([[[1.0, -9.0], [2.0, 3.0]], [[-4.0, 5.0], [-8.0, 7.0]]])
    assert max_abs(x, None).tolist() == [[9.0]]
    assert max_abs(x, None, 1).tolist() == [[9.0, 8.0]]
    assert max_abs(x, None, 2).tolist() == [[9.0, 3.0, 5.0, 8.0]]
    live = torch.tensor([[[False], [True]], [[True], [False]]])
    assert max_abs(x, live).tolist() == [[5.0]] and max_abs(x, live, 2).tolist() == [[0.0, 3.0, 5.0, 0.0]]
    nan = x.clone()
    nan[0, 0, 0] = math.nan
    assert max_abs(nan, live, 2).tolist() == [[0.0, 3.0, 5.0, 0.0]] and max_abs(nan, None).isnan().all()
    assert max_abs(x[:, :, :0], None, 2).tolist() == [[0.0] * 4] and max_abs(x[:0], None).tolist() == [[0.0]]


def test_the_unit_is_of_the_coarsest_dtype_that_took_part() -> None:
    one = call()
    assert tolerance_of(one) == TOLERANCE[torch.float32]
    one.softmax_dtype = torch.bfloat16
    assert tolerance_of(one) == TOLERANCE[torch.bfloat16]
    one.softmax_dtype, one.v = torch.float32, one.v.half()
    assert tolerance_of(one) == TOLERANCE[torch.float16]
    one.weights = torch.zeros(1, dtype=torch.bfloat16)
    assert tolerance_of(one) == TOLERANCE[torch.bfloat16]


def test_scores_round_in_the_dtype_that_they_were_formed_in() -> None:
    assert score_rounding(torch.bfloat16, True) == 2 * torch.finfo(torch.bfloat16).eps
    assert score_rounding(torch.bfloat16, False) == 2 * torch.finfo(torch.float32).eps
    assert score_rounding(torch.float64, False) == 2 * torch.finfo(torch.float64).eps


def test_rows_that_a_selection_keeps() -> None:
    one = call(t=5)
    assert kept_row_indices(one, None).tolist() == [0, 1, 2, 3, 4]
    assert kept_row_indices(one, slice(-2, None)).tolist() == [3, 4]
    assert kept_row_indices(one, (4, 1)).tolist() == [4, 1]
