"""Aggregation, rollout and flow against explicit float64 math, networkx, and a real model."""

from __future__ import annotations

from typing import Any

import networkx
import numpy as np
import pytest
import torch
from torch import Tensor

import hookattn
from hookattn import analyze
from hookattn.errors import FieldNotCaptured, MeasureError, SelectionError
from tests.analyze.build import CASES, case, given, previous, uniform

SQUARE: dict[str, dict[str, Any]] = {
    name: options for name, options in CASES.items() if not {"t", "queries", "g"} & set(options)
}


def over(weights: Tensor, how: str) -> Tensor:
    """T S, of H T S."""
    x = weights.numpy()
    made = {
        "mean": sum(x) / len(x),
        "max": np.maximum.reduce(x),
        "min": np.minimum.reduce(x),
        "norm": np.sqrt(sum(h**2 for h in x)),
    }
    return torch.from_numpy(made[how])


def layers(made: Any, how: str, residual: float) -> list[list[list[list[float]]]]:
    """The matrices A of each example and layer, in plain loops."""
    b, _, t, _ = made.mask.shape
    every = []
    for i in range(b):
        own = []
        for weights in made.weights:
            w = over(weights[i], how)
            rows = []
            for j in range(t):
                total = float(w[j].sum())
                row = [residual * (j == k) + (1 - residual) * float(w[j, k]) / total if total else 0 for k in range(t)]
                rows.append(row if made.rows[i, j] and total else [float(j == k) for k in range(t)])
            own.append(rows)
        every.append(own)
    return every


# -------------------------------------------------------------------------------------------------- aggregation


@pytest.mark.parametrize("how", ["mean", "max", "min", "norm"])
def test_aggregation(how: str) -> None:
    made = case(heads=(3, 0, 2), pad=(0, 2))
    found = analyze.aggregate(made.trace, how)
    for got, weights in zip(found, made.weights, strict=True):
        for i in range(2):
            torch.testing.assert_close(got[i].double(), over(weights[i], how), atol=1e-6, rtol=1e-6)
    both = analyze.aggregate_layers(made.trace, how)
    for head in range(3):
        expected = over(torch.stack([w[1, head] for w in made.weights]), how)
        torch.testing.assert_close(both[1, head].double(), expected, atol=1e-6, rtol=1e-6)


def test_what_cannot_be_aggregated() -> None:
    with pytest.raises(SelectionError, match=r"how='sum': expected one of mean, max, min, norm"):
        analyze.aggregate(given(uniform(4)), "sum")
    with pytest.raises(MeasureError, match=r"layers.0.attn.* has B1 H2 T4 S4, call 1 .* has B1 H2 T5 S5"):
        analyze.aggregate_layers(given([uniform(4, 2), uniform(5, 2)]))
    made = case(heads=(3, 0)).trace
    made[1].heads = (3, 1)
    with pytest.raises(MeasureError, match=r"has heads \[3, 0\], call 1 .* has \[3, 1\]"):
        analyze.aggregate_layers(made)
    assert [x.shape[-1] for x in analyze.aggregate(given([uniform(4, 2), uniform(5, 3)]))] == [4, 5]


# ------------------------------------------------------------------------------------------------------ rollout


@pytest.mark.parametrize("kind", SQUARE)
@pytest.mark.parametrize(("how", "residual"), [("mean", 0.5), ("max", 0.2), ("min", 0.0), ("norm", 0.9)])
def test_rollout_is_the_product_of_the_layers(kind: str, how: str, residual: float) -> None:
    made = case(**SQUARE[kind], layers=3)
    found = analyze.rollout(made.trace, heads=how, residual=residual)
    assert found.shape == (3, 2, 9, 9)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 2, 9), atol=1e-5, rtol=0)
    for i, matrices in enumerate(layers(made, how, residual)):
        product = np.eye(9)
        for layer, matrix in enumerate(matrices):
            product = np.array(matrix) @ product
            np.testing.assert_allclose(found[layer, i].numpy(), product, atol=2e-6)


def test_rollout_of_real_tokens_gives_nothing_to_padding_or_to_the_future() -> None:
    for kind in ("padded right", "padded left", "encoder, padded"):
        made = case(**SQUARE[kind], layers=3)
        last = analyze.rollout(made.trace)[-1]
        apart = made.rows[:, :, None] & ~made.real[:, None]
        assert last[apart].abs().max() == 0
    assert analyze.rollout(case(layers=3).trace)[-1].triu(1).abs().max() == 0


def test_padding_changes_nothing() -> None:
    long_ = case(b=1, pad=(3,), layers=3, causal=False)
    part = given([w[..., :6, :6] for w in long_.weights], mask=torch.ones(6, 6, dtype=torch.bool))
    whole = analyze.rollout(long_.trace)[-1]
    torch.testing.assert_close(whole[:, :6, :6].double(), analyze.rollout(part)[-1], atol=1e-6, rtol=0)


def test_rollout_in_closed_form() -> None:
    found = analyze.rollout(given([previous(5)] * 2))[-1, 0]
    # Two layers of (I + back by one) / 2: a quarter, a half and a quarter, two, one and no tokens back.
    assert found[4].tolist() == [0, 0, 0.25, 0.5, 0.25]
    assert found[0].tolist() == [1, 0, 0, 0, 0]
    later = analyze.rollout(given([previous(5)] * 3), start_layer=-1)
    assert later.shape[0] == 1 and later[0, 0, 3].tolist() == [0, 0, 0.5, 0.5, 0]


def test_what_is_said_to_be_padding_stays_itself() -> None:
    made = case(causal=False)
    made.rows = torch.ones(2, 9, dtype=torch.bool)
    made.rows[0, 6:] = False
    found = analyze.rollout(made.trace, real=made.rows)
    expected = np.array(layers(made, "mean", 0.5)[0])
    np.testing.assert_allclose(found[1, 0].numpy(), expected[1] @ expected[0], atol=1e-6)


# --------------------------------------------------------------------------------------------------------- flow


def network(matrices: list[list[list[float]]]) -> Any:
    graph = networkx.DiGraph()
    for layer, matrix in enumerate(matrices):
        for i, row in enumerate(matrix):
            for j, capacity in enumerate(row):
                if capacity > 0:
                    graph.add_edge((layer + 1, i), (layer, j), capacity=capacity)
    return graph


@pytest.mark.parametrize("kind", ["causal", "encoder, padded", "padded left", "sinks"])
def test_flow_is_networkx_maximum_flow(kind: str) -> None:
    made = (
        case(**SQUARE[kind], t=6, layers=3)
        if kind != "encoder, padded"
        else case(t=6, layers=3, pad=(2, 0), causal=False)
    )
    found = analyze.flow(made.trace, heads="max", residual=0.3)
    assert found.shape == (2, 6, 6)
    for i, matrices in enumerate(layers(made, "max", 0.3)):
        graph = network(matrices)
        for j in range(6):
            for k in range(6):
                expected = 0.0
                if (0, k) in graph and (3, j) in graph:
                    expected = networkx.maximum_flow_value(graph, (3, j), (0, k))
                assert float(found[i, j, k]) == pytest.approx(expected, abs=2e-6)


def test_flow_of_some_tokens() -> None:
    made = case(t=7, layers=3)
    whole = analyze.flow(made.trace)
    assert torch.equal(analyze.flow(made.trace, [-1, 2]), whole[:, [6, 2]])
    assert torch.equal(analyze.flow(made.trace, [3], start_layer=2)[:, 0], analyze.flow(made.trace[2:])[:, 3])
    one = analyze.flow(made.trace[:1], residual=0.5)
    torch.testing.assert_close(one, analyze.rollout(made.trace[:1])[0].double(), atol=1e-8, rtol=0)


def test_flow_in_closed_form() -> None:
    found = analyze.flow(given([previous(5)] * 2))[0]
    # Half stays in each layer and half goes back by one: two tokens back there is one way of a half, one back two.
    assert found[4].tolist() == pytest.approx([0, 0, 0.5, 1, 0.5], abs=1e-8)


def test_what_is_not_finite_is_nan() -> None:
    w = uniform(4, b=2)
    w[1, 0, 2, 1] = torch.nan
    made = analyze.flow(given(w, mask=torch.ones(4, 4, dtype=torch.bool).tril()))
    assert made[1].isnan().all() and not made[0].isnan().any()
    assert analyze.rollout(given(w, mask=torch.ones(4, 4, dtype=torch.bool).tril()))[0, 1, 2].isnan().all()


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("trace", "why"),
    [
        (lambda: case(cross=True, t=9, s=9).trace, "cross-attention"),
        (lambda: case(t=3, s=7).trace, "3 queries and 7 keys"),
        (lambda: case(queries=(1, 4, 8)).trace, "query rows were left out"),
        (lambda: given([uniform(4), uniform(6)]), "B1 T4 S4, call 1 .* has B1 T6 S6"),
        (hookattn.Trace, "no calls"),
    ],
)
@pytest.mark.parametrize("of", [analyze.rollout, analyze.flow])
def test_what_is_no_stack_of_layers(of: Any, trace: Any, why: str) -> None:
    with pytest.raises(MeasureError, match=why):
        of(trace())


def test_several_steps_or_stacks() -> None:
    both = given([uniform(4), uniform(4)])
    both[1].step = 1
    with pytest.raises(MeasureError, match=r"call 1 .* another forward than call 0 .* trace.select\(step=…\)"):
        analyze.rollout(both)
    other = given(uniform(4), stack="encoder").calls + given(uniform(4), stack="vision").calls
    with pytest.raises(MeasureError, match=r"in the stack vision and call 0 .* in encoder"):
        analyze.rollout(hookattn.Trace(other))


def test_bad_arguments() -> None:
    trace = given([uniform(4)] * 2)
    for wrong in (-0.1, 1, 2):
        with pytest.raises(SelectionError, match=f"residual={wrong}: expected a share"):
            analyze.rollout(trace, residual=wrong)
    with pytest.raises(SelectionError, match="start_layer=2: the trace has 2 calls"):
        analyze.rollout(trace, start_layer=2)
    with pytest.raises(SelectionError, match="heads='sum'"):
        analyze.rollout(trace, heads="sum")
    for queries in ([4], [-5], []):
        with pytest.raises(SelectionError, match=r"queries=.*: expected tokens from -4 to 3"):
            analyze.flow(trace, queries)
    with pytest.raises(FieldNotCaptured, match="weights"):
        analyze.rollout(case(keep=("v", "q", "k")).trace)


def test_a_real_model() -> None:
    pytest.importorskip("transformers")
    from tests.tiny_models import bert, padded

    model, inputs = bert(), padded("right")
    trace = hookattn.trace(model, inputs)
    attentions = bert("eager")(**inputs, output_attentions=True).attentions
    expected = torch.eye(7)
    for layer in attentions:
        expected = (0.5 * layer.mean(1) + 0.5 * torch.eye(7)) @ expected
    found = analyze.rollout(trace)[-1]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)
