"""Contributions of dimensions against plain loops, and their sum against the scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hookattn
from hookattn import analyze
from hookattn.errors import FieldNotCaptured, MeasureError, SelectionError
from tests.analyze.build import CASES, Case, case, given, uniform
from tests.reference import repeat_heads


def product(made: Case, layer: int) -> np.ndarray:
    """B H T S D: scale·q·k of each dimension."""
    call = made.trace[layer]
    k = call.k if call.kv_heads is None else call.k[:, list(call.kv_heads)]
    k = repeat_heads(k.double(), call.q.shape[1])
    return (call.scale * call.q.double()[:, :, :, None] * k[:, :, None]).numpy()


def columns(table: Any, layer: int, *shape: int) -> np.ndarray:
    """H B D → B H D."""
    return table[table.call == layer].contribution.to_numpy().reshape(shape).swapaxes(0, 1)


@pytest.mark.parametrize("kind", [*CASES, "cross"])
def test_contributions(kind: str) -> None:
    made = case(**({"cross": True, "s": 7, "pad": (0, 3)} if kind == "cross" else CASES[kind]))
    mean = analyze.neuron_contributions(made.trace)
    query = made.trace[0].queries[-1] if made.trace[0].queries else made.mask.shape[2] - 1
    row = analyze.neuron_contributions(made.trace, query)
    pair = analyze.neuron_contributions(made.trace, -1, 1)
    for layer, weights in enumerate(made.weights):
        each = product(made, layer)
        b, h, _, _, d = each.shape
        w = weights.numpy()
        got = columns(pair, layer, h, b, d)
        np.testing.assert_allclose(got, each[:, :, -1, 1], atol=1e-6)
        np.testing.assert_allclose(got.sum(-1), made.trace[layer].scores[:, :, -1, 1].numpy(), atol=2e-5)
        looks = np.zeros((*each.shape[:3], d))
        for key in range(w.shape[3]):
            looks += w[..., key, None] * each[..., key, :]
        np.testing.assert_allclose(columns(row, layer, h, b, d), looks[:, :, -1], atol=2e-6)
        for i in range(b):
            rows = [j for j in range(w.shape[2]) if made.rows[i, j] or kind == "cross"]
            expected = sum(looks[i, :, j] for j in rows) / len(rows) if rows else np.full((h, d), np.nan)
            np.testing.assert_allclose(columns(mean, layer, h, b, d)[i], expected, atol=2e-6)
    assert set(mean["head"]) == set(made.trace[0].heads or range(4))


def test_a_scale_for_each_head() -> None:
    made = case(layers=1)
    call = made.trace[0]
    plain = columns(analyze.neuron_contributions(made.trace), 0, 4, 2, 6)
    curve = analyze.neuron_decay(made.trace).contribution.to_numpy().reshape(4, -1)
    call.scale = torch.arange(1.0, 5).view(1, 4, 1, 1) * call.scale
    factor = np.arange(1.0, 5)
    got = columns(analyze.neuron_contributions(made.trace), 0, 4, 2, 6)
    np.testing.assert_allclose(got, plain * factor[:, None], atol=1e-6)
    scaled = analyze.neuron_decay(made.trace).contribution.to_numpy().reshape(4, -1)
    np.testing.assert_allclose(scaled, curve * factor[:, None], atol=1e-6)
    call.scale = torch.rand(9, 9)
    each = product(case(layers=1), 0) / 6**-0.5 * call.scale.double().numpy()[..., None]
    got = columns(analyze.neuron_contributions(made.trace, 5, 3), 0, 4, 2, 6)
    np.testing.assert_allclose(got, each[:, :, 5, 3], atol=1e-6)
    with pytest.raises(MeasureError, match=r"call 0 .* scale is another for each key"):
        analyze.neuron_decay(made.trace)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("longest", [64, 3])
def test_decay(kind: str, longest: int) -> None:
    made = case(**CASES[kind])
    table = analyze.neuron_decay(made.trace, longest=longest)
    for layer in range(2):
        each = product(made, layer)
        found: dict[int, list[np.ndarray]] = {}
        seen = set()
        for i, j in made.rows.nonzero().tolist():
            for key in made.real[i].nonzero().flatten().tolist():
                distance = int(made.positions[j]) - key
                found.setdefault(distance, []).append(each[i, :, j, key])
                if made.mask[i, 0, j, key]:
                    seen.add(distance)
        distances = sorted(d for d in seen if abs(d) <= longest)
        part = table[table.call == layer]
        h, n = each.shape[1], each.shape[-1]
        assert part.distance.tolist() == distances * (h * n)
        got = part.contribution.to_numpy().reshape(h, n, len(distances))
        expected = np.stack([np.mean(found[d], 0) for d in distances], -1)
        np.testing.assert_allclose(got, expected, atol=1e-9)


def test_what_is_not_finite_is_nan() -> None:
    made = case(layers=1)
    q = made.trace[0].fields["q"]
    assert isinstance(q, torch.Tensor)
    q[0, 2, 3, 1] = torch.inf
    for function in (analyze.neuron_contributions, analyze.neuron_decay):
        table = function(made.trace)
        bad = table[~np.isfinite(table.contribution)]
        assert set(bad["head"]) == {2} and set(bad.neuron) == {1}


def test_clear_errors() -> None:
    trace = case().trace
    with pytest.raises(SelectionError, match="key=3 without query="):
        analyze.neuron_contributions(trace, key=3)
    for query, key, what in ((9, None, "query 9"), (-10, None, "query -10"), (2, 9, "key 9"), (2, -10, "key -10")):
        with pytest.raises(SelectionError, match=rf"call 0 .* has no {what}; there are 9"):
            analyze.neuron_contributions(trace, query, key)
    with pytest.raises(SelectionError, match=r"has no query 2; there are 2: \(1, 4\)"):
        analyze.neuron_contributions(case(queries=(1, 4)).trace, 2)
    with pytest.raises(SelectionError, match="longest=-1: expected an int from 0"):
        analyze.neuron_decay(trace, longest=-1)
    with pytest.raises(FieldNotCaptured, match="'q'"):
        analyze.neuron_contributions(given(uniform(4)))
    with pytest.raises(MeasureError, match=r"call 0 .* no distance"):
        analyze.neuron_decay(case(cross=True).trace)
    with pytest.raises(MeasureError, match="no calls"):
        analyze.neuron_decay(hookattn.Trace())
    analyze.neuron_contributions(case(keep=("q", "k")).trace, 3, 2)


def test_a_real_model() -> None:
    """Grouped heads, rotary positions and padding: dimensions sum to the model's own scores."""
    pytest.importorskip("transformers")
    from tests.tiny_models import llama, padded

    trace = hookattn.trace(llama(), padded("left"))
    table = analyze.neuron_contributions(trace, 6, 4)
    sums = table.groupby(["call", "head", "example"]).contribution.sum().to_numpy()
    expected = torch.stack([call.scores[:, :, 6, 4].t() for call in trace]).flatten().double().numpy()
    np.testing.assert_allclose(sums, expected, atol=2e-5)
