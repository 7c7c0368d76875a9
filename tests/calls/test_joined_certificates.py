"""What a certificate says of itself, and what is said of several calls that were put together."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from hookattn.calls.certificate import UNVERIFIED, Certificate, joined


def certificate(status: str = "faithful", output: float = 1e-6, bound: float = 1e-5, **more: Any) -> Certificate:
    of = {"weights_error": None, "row_sum_error": 0.0, "weights_tolerance": 5e-5, "rows": 3, "of_rows": 7} | more
    return Certificate(status, output, tolerance=bound, **of)


GOOD, NEAR = certificate(output=1e-6, bound=1e-5), certificate(output=4e-6, bound=5e-6)
BAD, WORSE = certificate("unfaithful", 2e-5, 1e-5), certificate("unfaithful", 3e-6, 1e-7)
NOTHING = certificate("unverified", 9.0, 0.0)


@pytest.mark.parametrize(
    ("several", "expected"),
    [
        ([GOOD, NEAR], NEAR),  # near its bound, and not the one with the larger error alone
        ([certificate(output=3e-6, bound=1e-3), certificate(output=2e-6, bound=1e-5)], certificate(output=2e-6)),
        ([GOOD, BAD, NEAR], BAD),  # one that is unfaithful makes the whole unfaithful
        ([BAD, WORSE], WORSE),  # the furthest beyond its bound
        ([GOOD, NOTHING], NOTHING),  # what was not verified is not called faithful
        ([NOTHING, BAD], BAD),  # and hides no fault, whatever numbers it holds
        ([UNVERIFIED], UNVERIFIED),
    ],
)
def test_the_worst_of_several_speaks_for_all(several: list[Certificate], expected: Certificate) -> None:
    for order in itertools.permutations(several):
        found = joined(order)
        assert (found.status, found.output_error, found.tolerance, found.faithful) == (
            expected.status,
            expected.output_error,
            expected.tolerance,
            expected.status == "faithful",
        )


def test_among_unverified_calls_a_bound_of_nothing_counts_as_one() -> None:
    """Their errors are compared as they are: none of them has a bound."""
    low, high = certificate("unverified", 0.25, 0.0), certificate("unverified", 0.5, 0.0)
    assert joined([low, high]).output_error == joined([high, low]).output_error == 0.5


def test_errors_of_several_are_their_largest_and_rows_their_sum() -> None:
    several = [
        certificate(weights_error=2e-6, row_sum_error=1e-7, rows=3, of_rows=7),
        certificate(weights_error=None, row_sum_error=4e-7, rows=4, of_rows=20),
        certificate(weights_error=1e-6, row_sum_error=2e-7, rows=1, of_rows=1),
    ]
    for order in itertools.permutations(several):
        found = joined(order)
        assert (found.weights_error, found.row_sum_error, found.rows, found.of_rows) == (2e-6, 4e-7, 8, 28)
    assert joined([GOOD, NEAR]).weights_error is None


def test_the_largest_error_is_a_nan_where_there_is_one() -> None:
    assert certificate(output=3.0, weights_error=2.0, row_sum_error=1.0).max_error == 3.0
    assert certificate(output=1.0, weights_error=2.0, row_sum_error=1.5).max_error == 2.0
    assert certificate(output=1.0, weights_error=None, row_sum_error=2.0).max_error == 2.0
    for place in ("output", "weights_error", "row_sum_error"):
        assert math.isnan(certificate(**{"output": 9.0, place: math.nan}).max_error)


def test_what_it_says() -> None:
    told = str(certificate(output=1.5e-6, bound=5e-5, rows=3, of_rows=7))
    assert told == "faithful: output 1.5e-06 of 5.0e-05, 3 of 7 rows"
    told = str(certificate("unfaithful", 2e-4, 5e-5, weights_error=3e-5, basis="the kernel rerun without dropout"))
    assert told == "unfaithful: the kernel rerun without dropout 2.0e-04 of 5.0e-05, weights 3.0e-05, 3 of 7 rows"
    for place in ("output", "weights_error", "row_sum_error"):
        for value in (math.nan, math.inf):
            assert str(certificate(**{place: value})).endswith("3 of 7 rows; some numbers of the call are not finite")


def test_as_plain_data() -> None:
    assert certificate(weights_error=2.0).to_json() == {
        "status": "faithful",
        "output_error": 1e-6,
        "weights_error": 2.0,
        "row_sum_error": 0.0,
        "tolerance": 1e-5,
        "weights_tolerance": 5e-5,
        "rows": 3,
        "of_rows": 7,
        "basis": "output",
    }
