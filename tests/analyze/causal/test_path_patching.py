"""Path patching and the effects of edges, against the same model written out, with all that is held put in by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hookattn.analyze import edge_effects, log_probability, path_patching
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.errors import InputError, SelectionError
from tests import tiny_models
from tests.analyze.causal.twin import HEADS, LENGTH, At, Twin, curved_metric, ids

Field = tuple[int, str]


def model_of() -> tuple[Twin, Tensor, Tensor]:
    return Twin().eval(), ids(0), ids(1)


def sent(model: Twin, clean: Tensor, corrupted: Tensor, layer: int, head: int, frozen: str) -> At:
    """The clean run with one head's output of the corrupted one, and later heads frozen."""
    was, other = model.fields(clean), model.fields(corrupted)

    def at(i: int, n: str, x: Tensor) -> Tensor:
        if (i, n) == (layer, "z"):
            x = x.clone()
            x[:, head] = other[i, n][:, head]
        return was[i, n] if i > layer and n == frozen else x

    return at


def through(model: Twin, clean: Tensor, first: At, targets: list[tuple[int, int]], fields: list[str]) -> float:
    seen: dict[Field, Tensor] = {}

    def look(i: int, n: str, x: Tensor) -> Tensor:
        seen[i, n] = x
        return first(i, n, x)

    model.explicit(clean, look)

    def put(i: int, n: str, x: Tensor) -> Tensor:
        for layer, head in targets:
            if i == layer and n in fields:
                x = x.clone()
                x[:, head] = seen[i, n][:, head]
        return x

    return float(curved_metric(model.explicit(clean, put)))


@pytest.mark.parametrize("batch", [None, 1, 2])
@pytest.mark.parametrize(("frozen", "name"), [("output", "z"), ("weights", "weights")])
def test_the_direct_effect_on_the_output(frozen: str, name: str, batch: int | None) -> None:
    model, clean, corrupted = model_of()
    table = path_patching(model, clean, corrupted, curved_metric, frozen=frozen, batch=batch)
    assert table[["layer", "head"]].values.tolist() == [[i, h] for i in range(3) for h in range(HEADS)]
    wanted = [
        float(curved_metric(model.explicit(clean, sent(model, clean, corrupted, r.layer, r.head, name))))
        for r in table.itertuples()
    ]
    assert table["value"].tolist() == pytest.approx(wanted, abs=1e-10, rel=0)
    plain, other = float(curved_metric(model(clean))), float(curved_metric(model(corrupted)))
    assert table["effect"].tolist() == pytest.approx([x - plain for x in wanted], abs=1e-10)
    assert (table.attrs["clean"], table.attrs["corrupted"]) == pytest.approx((plain, other), abs=1e-10)
    assert table["effect"].abs().min() > 1e-5
    assert table.attrs["runs"]["each begins"] == "before the first edited layer"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("frozen", "name"), [("output", "z"), ("weights", "weights")])
@pytest.mark.parametrize("into", ["q", "k", "v", ("q", "k", "v")])
def test_the_effect_through_receivers(into: Any, frozen: str, name: str, batch: int) -> None:
    model, clean, corrupted = model_of()
    for targets in ([(2, 1)], [(2, 0), (1, 2), (2, 1)]):
        table = path_patching(
            model, clean, corrupted, curved_metric, receivers=targets, into=into, frozen=frozen, batch=batch
        )
        assert table[["layer", "head"]].values.tolist() == [[i, h] for i in range(2) for h in range(HEADS)]
        wanted = [
            through(model, clean, sent(model, clean, corrupted, r.layer, r.head, name), targets, list(into))
            for r in table.itertuples()
        ]
        assert table["value"].tolist() == pytest.approx(wanted, abs=1e-10, rel=0)
        assert table["effect"].abs().max() > 1e-5


def test_the_previous_token_head_speaks_to_the_keys_of_the_induction_heads() -> None:
    model, clean = load_pretrained(), example_tokens(0)
    corrupted = clean.clone()
    corrupted[0, 1:25] = clean[0, 1:25][torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    metric = log_probability(int(clean[0, -1]), -2)
    receivers = [(1, head) for head in range(4)]
    by = {field: path_patching(model, clean, corrupted, metric, receivers=receivers, into=field) for field in "qk"}
    assert by["k"]["effect"].min() < -1 > by["q"]["effect"].min() - 1
    assert by["k"].set_index("head")["effect"].idxmin() in (0, 1)


def test_what_path_patching_cannot_do_is_said() -> None:
    model, clean, corrupted = model_of()
    for error, said, wrong in (
        (SelectionError, "no sender", {"receivers": [(0, 1)]}),
        (SelectionError, "no layer 5", {"receivers": [(5, 1)]}),
        (SelectionError, "no 3", {"receivers": [(1, 3)]}),
        (InputError, "receivers", {"receivers": []}),
        (InputError, "receivers", {"receivers": [(1, 2, 3)]}),
        (InputError, "receivers", {"receivers": "logits"}),
        (SelectionError, "into", {"into": "output"}),
        (SelectionError, "into", {"into": []}),
        (SelectionError, "frozen", {"frozen": "q"}),
    ):
        with pytest.raises(error, match=said):
            path_patching(model, clean, corrupted, curved_metric, **wrong)  # type: ignore[arg-type]
    progress: list[int] = []
    path_patching(model, clean, corrupted, curved_metric, batch=2, progress=progress.append)
    assert progress == [2, 3, 5, 6, 8, 9]


def cut(model: Twin, x: Tensor, layer: int, head: int, query: int, key: int, direct: bool) -> float:
    was = model.fields(x)

    def at(i: int, n: str, y: Tensor) -> Tensor:
        if (i, n) == (layer, "weights"):
            y = y.clone()
            y[:, head, query, key] = 0
            total = y[:, head, query].sum(-1, keepdim=True)
            y[:, head, query] = torch.where(total > 0, y[:, head, query] / total, 0)
        return was[i, n] if direct and i > layer and n == "z" else y

    return float(curved_metric(model.explicit(x, at)))


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_the_effects_of_edges(batch: int | None) -> None:
    model, x, _ = model_of()
    edges = [(0, 1, -1, 2), (2, 0, 3, 1), (1, 2, 5, -6), (0, 2, 4, 4), (0, 0, 0, 0), (1, 0, 2, 1)]
    seen: list[int] = []
    table = edge_effects(model, x, curved_metric, edges, batch=batch, progress=seen.append)
    plain = float(curved_metric(model(x)))
    at = [(i, h, q % LENGTH, k % LENGTH) for i, h, q, k in edges]
    assert table[["layer", "head", "query", "key"]].values.tolist() == [list(edge) for edge in at]
    total = [cut(model, x, *edge, direct=False) - plain for edge in at]
    direct = [cut(model, x, *edge, direct=True) - plain for edge in at]
    assert table["total"].tolist() == pytest.approx(total, abs=1e-10, rel=0)
    assert table["direct"].tolist() == pytest.approx(direct, abs=1e-10, rel=0)
    assert table["indirect"].tolist() == pytest.approx([a - b for a, b in zip(total, direct, strict=True)], abs=1e-10)
    assert table["indirect"][1] == pytest.approx(0, abs=1e-12), "nothing comes after the last layer"
    assert abs(table["indirect"][0]) > 1e-6 < abs(table["direct"][0])
    weights = [float(model.fields(x)[i, "weights"][:, h, q, k].mean()) for i, h, q, k in at]
    assert table["weight"].tolist() == pytest.approx(weights, abs=1e-10)
    assert seen == sorted(seen) and seen[-1] == len(edges)


@pytest.mark.parametrize(
    ("edges", "error", "said"),
    [
        ([], InputError, "edges"),
        ([(0, 1, 2)], InputError, "edges"),
        (3, InputError, "edges"),
        ([(9, 0, 0, 0)], SelectionError, "no layer 9"),
        ([(0, 3, 0, 0)], SelectionError, "heads"),
        ([(0, 0, 6, 0)], SelectionError, "queries"),
        ([(0, 0, 0, -7)], SelectionError, "keys"),
    ],
)
def test_edges_that_are_none(edges: Any, error: type[Exception], said: str) -> None:
    model, x, _ = model_of()
    with pytest.raises(error, match=said):
        edge_effects(model, x, curved_metric, edges)


def test_kinds_of_attention_are_told_apart() -> None:
    pytest.importorskip("transformers")
    model = tiny_models.t5()
    inputs = {"input_ids": tiny_models.ids(5), "decoder_input_ids": tiny_models.ids(4)}
    metric: Callable[[Any], Tensor] = lambda y: y.logits[:, -1, 0].mean()  # noqa: E731
    with pytest.raises(SelectionError, match="say stack= or kind="):
        edge_effects(model, inputs, metric, [(0, 0, 1, 0)])
    table = edge_effects(model, inputs, metric, [(0, 0, -1, 1), (1, 1, -1, 4)], kind="cross", stack="decoder")
    assert table["kind"].tolist() == ["cross", "cross"] and table["total"].abs().min() > 0
    assert isinstance(table.attrs["plain"], float)
