"""Integrated gradients, against the integral over the math written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn import edit
from hookattn.analyze import integrated_gradients, log_probability
from hookattn.errors import GradientError, InputError, MeasureError, SelectionError
from hookattn.render.head_scores import scores_of
from tests import tiny_models
from tests.analyze.causal.twin import HEADS, LENGTH, Twin, curved_metric, ids


def integral(model: Twin, x: Tensor, layer: int, heads: list[int]) -> Tensor:
    """``A ⊙ ∫ ∂m(αA)/∂A dα`` by Simpson's rule, B H T S."""
    pattern = model.fields(x)[layer, "weights"]
    total, steps = torch.zeros_like(pattern), 40
    for n in range(steps + 1):
        factor = torch.ones(HEADS, 1, 1, dtype=torch.float64)
        factor[heads] = n / steps
        scaled = (pattern * factor).requires_grad_()
        y = model.explicit(x, lambda i, name, w: scaled if (i, name) == (layer, "weights") else w)
        share = (1 if n in (0, steps) else 4 if n % 2 else 2) / (3 * steps)
        total += torch.autograd.grad(curved_metric(y), scaled)[0] * share
    kept = torch.zeros(HEADS, 1, 1, dtype=torch.float64)
    kept[heads] = 1
    return pattern * total * kept


@pytest.mark.parametrize("heads", [None, [1], [0, -1]])
def test_it_is_the_integral(heads: list[int] | None) -> None:
    model, x = Twin(3), ids()
    scaled = [0, 1, 2] if heads is None else [h % HEADS for h in heads]
    edges = integrated_gradients(model, x, curved_metric, layer=[0, 2], heads=heads, steps=12, by="edge", top=10_000)
    table = integrated_gradients(model, x, curved_metric, layer=[0, 2], heads=heads, steps=12)
    for layer in (0, 2):
        wanted = integral(model, x, layer, scaled)
        of_layer = edges[edges["layer"] == layer]
        found = torch.zeros_like(wanted)
        at = [of_layer[name].tolist() for name in ("example", "head", "query", "key")]
        found[at] = torch.tensor(of_layer["integrated"].to_numpy())
        assert torch.allclose(found, wanted, rtol=0, atol=1e-6)
        assert wanted.abs().max() > 1e-2
        heads_of = table[table["layer"] == layer]
        assert heads_of["integrated"].tolist() == pytest.approx(found.sum((0, 2, 3)).tolist(), abs=1e-12)
        assert heads_of["integrated_magnitude"].tolist() == pytest.approx(
            found.abs().sum((0, 2, 3)).tolist(), abs=1e-12
        )
    assert {*table["layer"]} == {0, 2}


def test_completeness() -> None:
    model, x = Twin(3, 3.0), ids()
    table = integrated_gradients(model, x, curved_metric, steps=30)
    before = curved_metric(model(x)).item()
    assert table.attrs["metric"] == pytest.approx(before, abs=1e-12)
    for layer in range(3):
        without = curved_metric(hookattn.edited(model, x, edit.zero("weights", layer=layer)).output).item()
        total, worth = table.attrs["completeness"][layer]
        assert abs(worth) > 1e-2
        assert worth == pytest.approx(before - without, abs=1e-10)
        assert total == pytest.approx(worth, abs=1e-8)
        assert table["integrated"][table["layer"] == layer].sum() == pytest.approx(worth, abs=1e-8)
    few = integrated_gradients(model, x, curved_metric, steps=1).attrs["completeness"]
    assert max(abs(a - b) for a, b in few.values()) > 1e-6, "one step is as good: the test says nothing"


class Counting(Twin):
    """Counts the batch entries of each forward."""

    def __init__(self, time_first: bool = False):
        super().__init__(2)
        self.time_first, self.batches = time_first, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        x = x.t() if self.time_first else x
        self.batches.append(x.shape[0])
        y = super().forward(x)
        return y.transpose(0, 1) if self.time_first else y


def test_steps_are_run_as_batches() -> None:
    one, many, by_hand = Counting(), Counting(), Counting()
    x = ids()
    tables = [
        integrated_gradients(one, x, curved_metric, steps=10, at_once=1),
        integrated_gradients(many, x, curved_metric, steps=10),
        integrated_gradients(by_hand, {"x": x}, curved_metric, steps=10, at_once=5),
    ]
    assert one.batches == [2] * 25
    assert many.batches == [2, 16, 8, 16, 8]
    assert by_hand.batches == [2, 10, 10, 4, 10, 10, 4]
    for table in tables[1:]:
        assert table["integrated"].tolist() == pytest.approx(tables[0]["integrated"].tolist(), abs=1e-12)


@pytest.mark.parametrize("batch", [1, 2, LENGTH])
def test_a_batch_that_is_not_first_is_run_step_by_step(batch: int) -> None:
    def metric(y: Tensor) -> Tensor:
        return curved_metric(y.transpose(0, 1))

    model, plain, x = Counting(time_first=True), Twin(2), ids(0, 6)[:batch]
    wanted = integrated_gradients(plain, x, curved_metric, steps=5)
    found = integrated_gradients(model, x.t(), metric, steps=5)
    assert found["integrated"].tolist() == pytest.approx(wanted["integrated"].tolist(), abs=1e-12)
    with pytest.raises(MeasureError, match="at_once=1"):
        integrated_gradients(model, x.t(), metric, steps=5, at_once=4)


def test_transformers() -> None:
    x = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": x, "decoder_input_ids": x[:, :4]}
    table = integrated_gradients(
        tiny_models.t5().double(), given, log_probability([3, 7]), layer=-1, kind="cross", steps=60
    )
    assert {*table["kind"]} == {"cross"}
    assert {*table["layer"]} == {1}
    ((total, worth),) = table.attrs["completeness"].values()
    assert total == pytest.approx(worth, abs=2e-2 * abs(worth))
    llama = integrated_gradients(tiny_models.llama(), x, log_probability(3), layer=1, steps=20)
    ((total, worth),) = llama.attrs["completeness"].values()
    assert total == pytest.approx(worth, abs=1e-3)


def test_the_viewer_takes_the_table() -> None:
    model, x = Twin(2), ids()
    table = integrated_gradients(model, x, curved_metric, layer=1)
    scores = scores_of(table, hookattn.trace(model, x).select(layer=1))
    assert scores["integrated"]["values"] == [table["integrated"].tolist()]


def test_what_is_refused() -> None:
    model, x = Twin(2), ids()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"layer": 5}, SelectionError, "5"),
        ({"kind": "cross"}, SelectionError, "cross"),
        ({"heads": [3]}, SelectionError, "has 3 heads"),
        ({"heads": "all"}, SelectionError, "heads='all'"),
        ({"steps": 0}, SelectionError, "steps=0"),
        ({"at_once": 0}, SelectionError, "at_once=0"),
        ({"by": "example"}, SelectionError, "by='example'"),
        ({"metric": lambda y: y}, InputError, "scalar"),
        ({"metric": lambda y: y.sum().detach()}, GradientError, "in no graph"),
        ({"metric": None}, InputError, "metric=None"),
    ]
    for change, error, words in cases:
        with pytest.raises(error, match=words):
            integrated_gradients(model, x, **{"metric": curved_metric, **change})

    class Twice(Twin):
        def forward(self, x: Tensor) -> Tensor:
            y = self.embedding(x)
            return self.layers[0].after(y + self.layers[0].self_attn(self.layers[0].self_attn(y)))

    with pytest.raises(MeasureError, match="ran several times"):
        integrated_gradients(Twice(), x, curved_metric)
