"""Variability over inputs against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn import analyze
from hookattn.errors import MeasureError, SelectionError
from tests.analyze.build import case, given, previous, uniform


def explicit(inputs: list[Tensor]) -> float:
    """Of T S matrices of one size."""
    n, (t, s) = len(inputs), inputs[0].shape
    apart = whole = 0.0
    for i in range(t):
        for j in range(s):
            mean = sum(float(w[i, j]) for w in inputs) / n
            apart += sum(abs(float(w[i, j]) - mean) for w in inputs)
            whole += sum(float(w[i, j]) for w in inputs)
    return apart / (2 * whole)


@pytest.mark.parametrize(
    ("options", "starts", "length"),
    [
        ({}, (0, 0, 0), 9),
        ({"causal": False}, (0, 0, 0), 9),
        ({"pad": (0, 3, 1)}, (0, 0, 0), 6),
        ({"pad": (2, 0, 4), "side": "left"}, (2, 0, 4), 5),
        ({"heads": (3, 1), "sinks": True}, (0, 0, 0), 9),
    ],
)
@pytest.mark.parametrize("tokens", [None, 4])
def test_variability_over_a_batch(options: dict[str, Any], starts: tuple[int, ...], length: int, tokens: Any) -> None:
    made = case(b=3, **options)
    table = analyze.variability(made.trace, tokens=tokens)
    n = min(length, tokens or length)
    for layer, weights in enumerate(made.weights):
        for at, head in enumerate(made.trace[layer].heads or range(4)):
            inputs = [weights[i, at, a : a + n, a : a + n] for i, a in enumerate(starts)]
            line = table[(table.call == layer) & (table["head"] == head)]
            assert line.variability.item() == pytest.approx(explicit(inputs), abs=1e-6)
            assert line.examples.item() == 3


def test_variability_over_traces() -> None:
    """Prompts of several lengths, one of them a batch; the same as of one batch of their first tokens."""
    several = [case(b=1, seed=1), case(b=2, seed=2, t=7, pad=(0, 2))]
    table = analyze.variability([made.trace for made in several])
    for layer in range(2):
        inputs = [w for made in several for w in made.weights[layer][:, 1, :5, :5]]
        assert table[(table.call == layer) & (table["head"] == 1)].variability.item() == pytest.approx(
            explicit(inputs), abs=1e-6
        )
    assert set(table.examples) == {3}
    said = [torch.ones(1, 9).tril(3), torch.ones(2, 7)]
    table = analyze.variability([made.trace for made in several], real=said)
    inputs = [w for made in several for w in made.weights[0][:, 2, :4, :4]]
    assert table[(table.call == 0) & (table["head"] == 2)].variability.item() == pytest.approx(
        explicit(inputs), abs=1e-6
    )


def test_cross_attention() -> None:
    made = case(cross=True, t=5, s=8, pad=(0, 3))
    table = analyze.variability(made.trace)
    inputs = list(made.weights[1][:, 0, :, :5])
    assert table[(table.call == 1) & (table["head"] == 0)].variability.item() == pytest.approx(
        explicit(inputs), abs=1e-6
    )


def test_closed_forms() -> None:
    assert analyze.variability(given(uniform(6, b=3))).variability.item() == 0
    here = torch.eye(4).view(1, 1, 4, 4)
    # Half of the inputs one way and half the other: each is half away from the mean in both places, but for the first.
    assert analyze.variability([given(here), given(previous(4))]).variability.item() == pytest.approx(3 / 8)


def test_clear_errors() -> None:
    with pytest.raises(MeasureError, match=r"call 0 .* has one input; expected two or more"):
        analyze.variability(given(uniform(4)))
    with pytest.raises(MeasureError, match=r"same calls; these have \[1, 2\] calls"):
        analyze.variability([given(uniform(4)), given([uniform(4)] * 2)])
    with pytest.raises(MeasureError, match=r"heads \[0\] meets call 0 .* heads \[0, 1\]"):
        analyze.variability([given(uniform(4)), given(uniform(4, 2))])
    with pytest.raises(SelectionError, match=r"tokens=0: expected an int from 1"):
        analyze.variability(given(uniform(4, b=2)), tokens=0)
    with pytest.raises(MeasureError, match="real= has 1 entries for 2 traces"):
        analyze.variability([given(uniform(4))] * 2, real=[None])
    with pytest.raises(MeasureError, match="nothing but padding"):
        analyze.variability(given(uniform(4, b=2)), real=torch.tensor([[1] * 4, [0] * 4]))
    with pytest.raises(MeasureError, match=r"these have \[\] calls"):
        analyze.variability([])
    with pytest.raises(MeasureError, match="no calls"):
        analyze.variability(hookattn.Trace())
