"""Where the colours of weights end."""

from __future__ import annotations

import numpy as np
import pytest

from hookattn.render.scale import scale_end


def softmax(scores: np.ndarray, causal: bool) -> np.ma.MaskedArray:
    may = np.tri(len(scores), dtype=bool) if causal else np.ones(scores.shape, bool)
    e = np.where(may, np.exp(scores - np.where(may, scores, -np.inf).max(1, keepdims=True)), 0.0)
    return np.ma.masked_array(e / e.sum(1, keepdims=True), ~may)


def heads(n: int, causal: bool = True) -> dict[str, np.ma.MaskedArray]:
    rng, (i, j) = np.random.default_rng(0), np.indices((n, n))
    noise, sink = rng.normal(size=(n, n)), np.where(j == 0, np.log(n) + 2, 0)
    return {
        "uniform": softmax(np.zeros((n, n)), causal),
        "diffuse": softmax(noise, causal),
        "local": softmax(-np.abs(i - j) / 4, causal),
        "sharp": softmax(12.0 * (j == np.maximum(i - 1, 0)) + noise, causal),
        "sink": softmax(sink + noise, causal),
        "half sharp": softmax(12.0 * ((j == i - n // 2 + 1) & (i >= n // 2)) + sink + noise, causal),
    }


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [49, 128, 512, 2048])
def test_a_head_is_neither_blank_nor_blotted(n: int, causal: bool) -> None:
    for name, weights in heads(n, causal).items():
        end = scale_end(weights, 0)
        if "sharp" in name:
            assert end > 0.9, name
            continue
        place = np.minimum(np.ma.compressed(weights) / end, 1)
        assert np.mean(place == 1) < 0.08, name
        assert end < 0.25, name
        if name == "uniform":
            assert place.min() >= 0.24


def test_few_rows_and_nothing() -> None:
    assert scale_end(np.array([[0.9, *[0.0125] * 8]])) == 0.9
    assert scale_end(softmax(np.zeros((9, 9)), True), 0) == 1.0
    assert scale_end(np.full((20, 20), np.nan)) == 0.0
    assert scale_end(np.zeros((20, 20))) == 0.0
    assert scale_end(np.zeros((0, 20))) == 0.0


def test_what_is_masked_counts_nowhere() -> None:
    weights = heads(64)["diffuse"]
    loud = np.ma.masked_array(np.where(weights.mask, 1e6, weights.data), weights.mask)
    assert scale_end(loud, 0) == scale_end(weights, 0) == scale_end(weights.filled(np.nan), 0)


def test_the_end_has_two_digits_and_is_above_the_quantile() -> None:
    weights = np.full((20, 100), 0.001)
    weights[:, 7] = np.arange(20) / 1000 + 0.0512345
    weights[0, 9] = 1.0
    assert scale_end(weights) == pytest.approx(0.067)  # the fifteenth of twenty, 0.0662345
    weights[:, 7] = 0.05
    assert scale_end(weights) == pytest.approx(0.05)


def test_weights_below_zero_count_by_their_size() -> None:
    weights = np.full((20, 100), -0.001)
    weights[:, 7] = -0.05
    weights[0, 9] = 1.0
    assert scale_end(weights) == pytest.approx(0.05)
