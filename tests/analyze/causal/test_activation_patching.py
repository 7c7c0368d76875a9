"""Activation patching and ablation, against the same model written out with the patch done by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import edit
from hookattn.analyze import (
    activation_patching,
    edge_effects,
    head_ablation,
    integrated_gradients,
    log_probability,
    path_patching,
)
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.errors import EditError, InputError, MeasureError, SelectionError
from hookattn.render.head_scores import scores_of
from tests import tiny_models
from tests.analyze.causal.twin import HEADS, LENGTH, Twin, curved_metric, ids

NAMES = {"output": "z"}


def by_hand(
    model: Twin, base: Tensor, other: Tensor, field: str, layer: int, head: int, position: int | None = None
) -> float:
    name = NAMES.get(field, field)
    values = model.fields(other)[layer, name]

    def patched(i: int, n: str, x: Tensor) -> Tensor:
        if (i, n) != (layer, name):
            return x
        x = x.clone()
        rows = slice(None) if position is None else position
        x[:, head, rows] = values[:, head, rows]
        return x

    return float(curved_metric(model.explicit(base, patched)))


@pytest.mark.parametrize("batch", [None, 1, 2])
@pytest.mark.parametrize("field", ["output", "q", "k", "v", "weights"])
def test_each_head_is_patched_as_by_hand(field: str, batch: int | None) -> None:
    model, clean, corrupted = Twin().eval(), ids(0), ids(1)
    table = activation_patching(model, clean, corrupted, curved_metric, field=field, batch=batch)
    assert len(table) == 3 * HEADS
    wanted = [by_hand(model, corrupted, clean, field, r.layer, r.head) for r in table.itertuples()]
    assert table["value"].tolist() == pytest.approx(wanted, abs=1e-10, rel=0)
    plain = float(curved_metric(model(corrupted))), float(curved_metric(model(clean)))
    assert table.attrs["corrupted"] == pytest.approx(plain[0], abs=1e-10)
    assert table.attrs["clean"] == pytest.approx(plain[1], abs=1e-10)
    assert table["effect"].tolist() == pytest.approx([x - plain[0] for x in wanted], abs=1e-10)
    assert table["restored"].tolist() == pytest.approx([(x - plain[0]) / (plain[1] - plain[0]) for x in wanted])
    assert table["effect"].abs().max() > 1e-3
    assert table.attrs["runs"]["each begins"] == "before the first edited layer"
    assert table.attrs["runs"]["why"] == ""


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("field", ["output", "k", "weights"])
def test_each_position_alone_and_the_other_way(field: str, batch: int) -> None:
    model, clean, corrupted = Twin().eval(), ids(0), ids(1)
    table = activation_patching(
        model, clean, corrupted, curved_metric, field=field, into="clean", positions=True, layers=[-1, 0], batch=batch
    )
    assert len(table) == 2 * HEADS * LENGTH
    wanted = [by_hand(model, clean, corrupted, field, r.layer, r.head, r.position) for r in table.itertuples()]
    assert table["value"].tolist() == pytest.approx(wanted, abs=1e-10, rel=0)
    some = activation_patching(
        model, clean, corrupted, curved_metric, field=field, into="clean", positions=[-1, 1], layers=2, heads=[1]
    )
    assert some[["layer", "head", "position"]].values.tolist() == [[2, 1, 1], [2, 1, 5]]
    same = table.merge(some, on=["layer", "head", "position"])
    assert same["value_x"].tolist() == pytest.approx(same["value_y"].tolist(), abs=1e-12)


def test_the_runs_together_are_the_runs_alone_in_float32() -> None:
    model, (clean, corrupted) = tiny_models.gpt2(), torch.stack([tiny_models.ids(), tiny_models.ids().flip(1)])
    metric = log_probability(3)
    several = activation_patching(model, {"input_ids": clean}, {"input_ids": corrupted}, metric, batch=4)
    single = activation_patching(model, {"input_ids": clean}, {"input_ids": corrupted}, metric, batch=1)
    assert several.attrs["runs"]["runs in a forward"] == 4
    assert several["value"].tolist() == pytest.approx(single["value"].tolist(), abs=1e-6)
    assert (
        several.attrs["runs"]["each begins"] == single.attrs["runs"]["each begins"] == "before the first edited layer"
    )
    for row in single.itertuples():
        of = hookattn.trace(model, {"input_ids": clean}).select(layer=row.layer)[0].output[:, [row.head]]
        change = edit.patch("output", of, layer=row.layer, heads=[row.head])
        wanted = metric(hookattn.edited(model, {"input_ids": corrupted}, change).output)
        assert row.value == pytest.approx(float(wanted), abs=1e-6)


def test_the_heads_that_copy_are_found_in_the_trained_model() -> None:
    model, clean = load_pretrained(), example_tokens(0)
    corrupted = clean.clone()
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    corrupted[0, 1:25] = clean[0, 1:25][shuffled]  # the first copy tells nothing of the order of the second
    metric = log_probability(int(clean[0, -1]), -2)
    table = activation_patching(model, clean, corrupted, metric).set_index(["layer", "head"])
    assert table.attrs["clean"] > -0.1 and table.attrs["corrupted"] < -5
    report = hookattn.analyze.report(hookattn.trace(model, clean, tokens=[str(i) for i in clean[0].tolist()]))
    report = report.set_index(["layer", "head"])
    previous, induction = report["previous_token"].idxmax(), report["induction"].idxmax()
    assert previous[0] == 0 and induction[0] == 1
    assert table["restored"][previous] > 0.3 and table["restored"][induction] > 0.3
    lost = head_ablation(model, clean, metric).set_index(["layer", "head"])["effect"]
    assert lost.idxmin() == previous and lost[previous] < -3


def scores_shown(model: nn.Module) -> Any:
    clean, corrupted = ids(0), ids(1)
    return activation_patching(model, clean, corrupted, curved_metric), hookattn.trace(model, corrupted)


def test_the_viewer_takes_the_table() -> None:
    table, trace = scores_shown(Twin().eval())
    shown = scores_of(table, trace)
    assert shown["effect"]["unit"] == "metric"
    assert shown["restored"]["values"][1] == table["restored"][HEADS : 2 * HEADS].tolist()


def test_ablation_is_as_by_hand() -> None:
    model, x = Twin().eval(), ids(0)

    def without(layer: int, head: int, by: str) -> float:
        def at(i: int, n: str, z: Tensor) -> Tensor:
            if (i, n) != (layer, "z"):
                return z
            z = z.clone()
            z[:, head] = 0 if by == "zero" else z[:, head].mean(1, keepdim=True)
            return z

        return float(curved_metric(model.explicit(x, at)))

    for by in ("zero", "mean"):
        for batch in (1, 2):
            table = head_ablation(model, x, curved_metric, by=by, batch=batch)
            wanted = [without(r.layer, r.head, by) for r in table.itertuples()]
            assert table["value"].tolist() == pytest.approx(wanted, abs=1e-10, rel=0)
            assert table["effect"].tolist() == pytest.approx([v - table.attrs["plain"] for v in wanted], abs=1e-10)
    for over in ("positions", "batch"):
        single = head_ablation(model, x, curved_metric, by="resample", over=over, batch=1)
        several = head_ablation(model, x, curved_metric, by="resample", over=over, batch=3)
        assert several["value"].tolist() == pytest.approx(single["value"].tolist(), abs=1e-12)
        assert single["effect"].abs().max() > 1e-3
        other = head_ablation(model, x[:, :5], curved_metric, by="resample", over=over, batch=1, seed=5)
        assert len(other) == 3 * HEADS


class InPlace(Twin):
    """Writes to what its layers have returned, and keeps what the first has returned for the end."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        kept = None
        for layer in self.layers:
            x = layer(x)
            kept = x.clone() if kept is None else kept
            x.mul_(1.25)
        return self.readout(x + kept)


class Stateful(Twin):
    """What is inside a layer counts its runs, and what it has counted is added at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        for layer in self.layers:
            layer.mlp.register_forward_hook(self.counted)

    def forward(self, ids: Tensor) -> Tensor:
        self.count = 0
        return super().forward(ids) + self.count

    def counted(self, *_: Any) -> None:
        self.count += 1


class Mixing(Twin):
    """Batch entries depend on each other, and the same ones twice over do not show it."""

    def forward(self, ids: Tensor) -> Tensor:
        y = super().forward(ids)
        return y + y.mean(0).sin()


class Shared(Twin):
    """One layer runs three times."""

    def __init__(self) -> None:
        super().__init__()
        for i in (1, 2):
            self.layers[i] = self.layers[0]


def values_alone(model: nn.Module, clean: Tensor, corrupted: Tensor, table: Any) -> list[float]:
    found = []
    source = hookattn.trace(model, clean)
    for row in table.itertuples():
        change = edit.patch("output", source[row.call].output[:, [row.head]], path=row.path, heads=[row.head])
        found.append(float(curved_metric(hookattn.edited(model, corrupted, change).output)))
    return found


@pytest.mark.parametrize(
    ("kind", "why"), [(InPlace, ""), (Stateful, "first layers are not run again"), (Mixing, "others in the batch")]
)
def test_a_model_that_does_more_is_seen_and_run_as_it_is(kind: Callable[[], Twin], why: str) -> None:
    model, clean, corrupted = kind().eval(), ids(0), ids(1)
    for batch in (1, 3):
        table = activation_patching(model, clean, corrupted, curved_metric, batch=batch)
        assert table["value"].tolist() == pytest.approx(values_alone(model, clean, corrupted, table), abs=1e-10)
        assert not any("forward" in vars(module) for module in model.modules())
    assert why in table.attrs["runs"]["why"], table.attrs["runs"]
    assert bool(table.attrs["runs"]["why"]) == bool(why)


def test_a_layer_that_runs_three_times_is_no_head_of_one_place() -> None:
    with pytest.raises(MeasureError, match="3 times"):
        activation_patching(Shared().eval(), ids(0), ids(1), curved_metric)


def test_train_mode_is_left_alone_and_runs_whole() -> None:
    model = Twin().train()
    table = activation_patching(model, ids(0), ids(1), curved_metric, batch=3)
    assert model.training and "train mode" in table.attrs["runs"]["why"]
    assert table["value"].tolist() == pytest.approx(values_alone(model, ids(0), ids(1), table), abs=1e-10)


def test_a_cache_that_is_given_is_not_written_to_again_and_again() -> None:
    transformers = pytest.importorskip("transformers")
    model, cache = tiny_models.gpt2(), transformers.DynamicCache()
    first, clean, corrupted = tiny_models.ids(4, 3).split(1)
    with torch.no_grad():
        model(first, past_key_values=cache, use_cache=True)
    table = activation_patching(
        model, {"input_ids": clean, "past_key_values": cache}, {"input_ids": corrupted, "past_key_values": cache},
        log_probability(3), layers=[0],
    )  # fmt: skip
    assert cache.get_seq_length() == 4
    assert "DynamicCache" in table.attrs["runs"]["why"]


def test_what_is_wrong_is_said() -> None:
    model, clean, corrupted = Twin().eval(), ids(0), ids(1)
    for error, said, wrong in (
        (SelectionError, "field", {"field": "mask"}),
        (SelectionError, "into", {"into": "both"}),
        (SelectionError, "no layer 7", {"layers": [7]}),
        (SelectionError, "no 3", {"heads": [3]}),
        (SelectionError, "positions", {"positions": [6]}),
        (SelectionError, "positions", {"positions": []}),
        (SelectionError, "positions=None", {"positions": None}),
        (SelectionError, "positions=1.5", {"positions": [0, 1.5]}),
        (SelectionError, "layers=\\[\\]", {"layers": []}),
        (SelectionError, "heads=\\[\\]", {"heads": []}),
        (InputError, "stack=3", {"stack": 3}),
        (InputError, "kind=", {"kind": np.ones(3)}),
        (InputError, "progress=", {"progress": "yes"}),
        (SelectionError, "stack='x'", {"stack": "x"}),
        (SelectionError, "batch", {"batch": 0}),
    ):
        with pytest.raises(error, match=said):
            activation_patching(model, clean, corrupted, curved_metric, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="scalar"):
        activation_patching(model, clean, corrupted, lambda y: y)
    with pytest.raises(InputError, match="metric"):
        activation_patching(model, clean, corrupted, "loss")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="as many batch entries and tokens"):
        activation_patching(model, clean, corrupted[:, :4], curved_metric)
    with pytest.raises(EditError, match="one"):
        head_ablation(model, clean[:1], curved_metric, by="resample", over="batch")
    assert not any("forward" in vars(module) for module in model.modules())
    progress: list[int] = []
    activation_patching(model, clean, corrupted, curved_metric, batch=2, progress=progress.append)
    assert progress == [2, 3, 5, 6, 8, 9]


class _Unrun(nn.Module):
    """Must not be run."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("it was run")


@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (SelectionError, {"layers": "x"}),
        (SelectionError, {"heads": [1.5]}),
        (SelectionError, {"heads": []}),
        (InputError, {"stack": 1}),
        (InputError, {"kind": 1}),
        (InputError, {"progress": 1}),
        (SelectionError, {"batch": "x"}),
        (InputError, {"metric": 1}),
    ],
    ids=str,
)
def test_what_is_wrong_in_itself_is_told_before_the_model_runs(error: type[Exception], wrong: dict[str, Any]) -> None:
    x, model = ids(0), _Unrun()
    one: dict[str, Any] = {"metric": curved_metric, **wrong}
    calls: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (activation_patching, {"clean": x, "corrupted": x, **one}),
        (path_patching, {"clean": x, "corrupted": x, **one}),
        (head_ablation, {"inputs": x, **one}),
    ]
    if not wrong.keys() & {"layers", "heads"}:
        calls.append((edge_effects, {"inputs": x, "edges": [(0, 0, 1, 0)], **one}))
    if not wrong.keys() & {"batch", "progress"}:
        one = {{"layers": "layer"}.get(name, name): value for name, value in one.items()}
        calls.append((integrated_gradients, {"inputs": x, **one}))
    for function, given in calls:
        with pytest.raises(error, match=f"{next(iter(wrong))[:5]}.*="):
            function(model, **given)


def test_inputs_that_cannot_be_copied() -> None:
    """Each run needs a copy of what may be written to."""
    with pytest.raises(InputError, match="object of generator, which each run needs a copy of"):
        head_ablation(Twin().eval(), {"x": ids(0), "more": (i for i in range(3))}, curved_metric)
