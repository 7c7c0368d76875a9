"""What makes weights of scores: each normalizer of the table against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from hookattn.attention.normalizers import NORMALIZERS, is_softmax, normalized, normalizer_of
from hookattn.testing import oracle
from tests.reference import causal, draw

B, H, T, S = 2, 3, 5, 7


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sunk", [False, True])
def test_as_defined(name: str, masked: bool, sunk: bool) -> None:
    if sunk and not is_softmax(name):
        pytest.skip("a sink is a softmax's")
    scores = 3 * draw(B, H, T, S, seed=1)
    before = scores.clone()
    mask = causal(T, S)[None, None] if masked else None
    sinks = draw(H, seed=2) if sunk else None
    weights = normalized(name, scores, mask, sinks)
    assert weights is not None and torch.equal(scores, before)
    expected = oracle.defined_weights(scores, mask, sinks, name)
    torch.testing.assert_close(weights.double(), expected, atol=2e-6, rtol=2e-6)
    if masked:
        assert not weights[..., ~causal(T, S)].any()
    off = (weights.sum(-1) - 1).abs().max()
    if normalizer_of(name).sums_to_one and not sunk and name != "softmax1":
        assert off < 1e-5
    else:
        assert off > 1e-3


@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_row_that_sees_no_key_weighs_nothing(name: str) -> None:
    mask = torch.ones(1, 1, T, S, dtype=torch.bool)
    mask[0, 0, 2] = False
    weights = normalized(name, draw(B, H, T, S, seed=1), mask)
    assert weights is not None and weights.isfinite().all()
    assert not weights[:, :, 2].any()


def test_sparse_weights_are_zero_and_large_scores_do_not_overflow() -> None:
    scores = torch.tensor([[[[1e30, -3e38, 0.0, -torch.inf]]], [[[2.0, 1.9, -5.0, 1.8]]]])
    weights = normalized("sparsemax", scores, None)
    assert weights is not None
    assert weights[0, 0, 0].tolist() == [1, 0, 0, 0]
    assert weights[1, 0, 0, 2] == 0 and torch.allclose(weights.sum(-1), torch.ones(()))


def test_what_is_not_in_the_table_is_not_computed() -> None:
    assert normalized("a function of somebody's own", draw(1, 1, 2, 2, seed=1), None) is None
    found = normalizer_of("entmax")
    assert not found.known and not found.sums_to_one and not is_softmax("entmax")


def test_the_oracle_defines_all_of_them() -> None:
    assert set(oracle.NORMALIZERS) == set(NORMALIZERS)
    assert {name for name, found in NORMALIZERS.items() if found.sums_to_one} == set(oracle.SUM_TO_ONE)
