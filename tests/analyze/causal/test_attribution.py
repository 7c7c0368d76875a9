"""Attribution patching and AtP*, against autograd through the math written out, and against patches that are run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn import edit
from hookattn.analyze import atp_star, attribution_patching, log_probability
from hookattn.errors import GradientError, InputError, MeasureError, SelectionError
from hookattn.render.head_scores import scores_of
from tests import tiny_models
from tests.analyze.causal.twin import HEADS, LENGTH, Twin, curved_metric, gradients, ids, logits_metric

CLEAN, CORRUPT = ids(0), ids(1)
NODES = ("output", "q", "k", "v")


def numbers(table: Any, name: str, *shape: int) -> Tensor:
    return torch.tensor(table[name].to_numpy()).view(*shape)


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    assert torch.allclose(a, b, rtol=0, atol=atol), (a - b).abs().max()


@pytest.mark.parametrize("sharpness", [1.0, 8.0])
def test_first_order_effects(sharpness: float) -> None:
    model = Twin(3, sharpness)
    clean, corrupt = model.fields(CLEAN), model.fields(CORRUPT)
    slopes = gradients(model, CLEAN, curved_metric)
    tables = {
        by: attribution_patching(model, CLEAN, CORRUPT, curved_metric, nodes=NODES, by=by)
        for by in ("head", "example", "position")
    }
    for node in NODES:
        key = "z" if node == "output" else node
        effects = torch.stack(
            [((corrupt[i, key] - clean[i, key]) * slopes[i, key]).sum(-1) for i in range(3)]
        )  # L B H T
        assert effects.abs().max() > 1e-3
        name = f"attribution({node})"
        close(numbers(tables["head"], name, 3, HEADS), effects.sum((1, 3)))
        close(numbers(tables["example"], name, 3, 2, HEADS), effects.sum(3))
        close(numbers(tables["position"], name, 3, HEADS, LENGTH), effects.sum(1))
    attrs = tables["head"].attrs
    assert attrs["clean"] == pytest.approx(curved_metric(model(CLEAN)).item(), abs=1e-12)
    assert attrs["corrupt"] == pytest.approx(curved_metric(model(CORRUPT)).item(), abs=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_small_changes_are_finite_differences() -> None:
    model, other = Twin(), ids(0).clone()
    step = 1e-6
    near = model.embedding.weight[CLEAN[0, 2]] + step * torch.randn(12, dtype=torch.float64)
    unused = min({*range(20)} - {*CLEAN.flatten().tolist()})
    other[:, 2] = unused
    with torch.no_grad():  # a token that is next to the clean one
        model.embedding.weight[unused] = near
    clean, corrupt = CLEAN[:1], other[:1]
    table = attribution_patching(model, clean, corrupt, curved_metric, nodes=NODES)
    kept, before = hookattn.trace(model, corrupt), curved_metric(model(clean)).item()
    for node in NODES:
        effects = [
            curved_metric(
                hookattn.edited(model, clean, edit.patch(node, kept, layer=layer, heads=[head])).output
            ).item()
            - before
            for layer in range(3)
            for head in range(HEADS)
        ]
        assert max(map(abs, effects)) > step / 100
        assert table[f"attribution({node})"].tolist() == pytest.approx(effects, abs=step * 1e-4)


def frozen(model: Twin) -> Twin:
    """With patterns of positions alone, whatever the tokens are."""
    with torch.no_grad():
        for layer in model.layers:
            for name in ("q", "k"):
                getattr(layer.self_attn, name).weight.zero_()
                getattr(layer.self_attn, name).bias.normal_(generator=torch.Generator().manual_seed(1))
    return model


def test_with_frozen_patterns_and_a_linear_readout_it_is_activation_patching() -> None:
    model = frozen(Twin(3, linear=True))
    corrupt = hookattn.trace(model, CORRUPT)
    before = logits_metric(model(CLEAN))
    table = attribution_patching(model, CLEAN, CORRUPT, logits_metric, nodes=["output", "v"])
    star = atp_star(model, CLEAN, CORRUPT, logits_metric, nodes="output", grad_drop=False, by="head")
    for row in table.itertuples():
        for node, found in (("output", row[8]), ("v", row[9])):
            patch = edit.patch(node, corrupt, layer=row.layer, heads=[row.head])
            effect = logits_metric(hookattn.edited(model, CLEAN, patch).output) - before
            assert abs(effect) > 1e-3
            assert found == pytest.approx(effect.item(), abs=1e-10)
    assert table.columns[7:].tolist() == ["attribution(output)", "attribution(v)"]
    assert star["atp_star(output)"].min() > 0


@pytest.mark.parametrize("sharpness", [1.0, 60.0])
def test_patched_queries_and_keys_are_exact_where_what_follows_is_linear(sharpness: float) -> None:
    """In one layer with a linear readout nothing is left to approximate, however saturated the softmax is."""
    model = Twin(1, sharpness, linear=True)
    corrupt = hookattn.trace(model, CORRUPT)
    star = atp_star(model, CLEAN[:1], CORRUPT[:1], logits_metric, by="position")
    first = attribution_patching(model, CLEAN[:1], CORRUPT[:1], logits_metric, nodes=NODES, by="position")
    before = logits_metric(model(CLEAN[:1]))
    worst = 0.0
    for node in ("q", "k", "v", "output"):
        places = "keys" if node in "kv" else "queries"
        for head in range(HEADS):
            for position in range(LENGTH):
                where: Any = {"layer": 0, "heads": [head], places: [position]}
                other = corrupt.calls[0].get(node)[:1, head : head + 1, position : position + 1]
                patched = hookattn.edited(model, CLEAN[:1], edit.patch(node, other, **where)).output
                effect = (logits_metric(patched) - before).item()
                at = head * LENGTH + position
                assert star[f"atp_star({node})"][at] == pytest.approx(abs(effect), abs=1e-10)
                worst = max(worst, abs(first[f"attribution({node})"][at] - effect))
    assert worst > 1e-3, "to first order it is as exact: the test says nothing"


def test_gradients_are_dropped_layer_by_layer() -> None:
    model = Twin(3)
    clean, corrupt = model.fields(CLEAN), model.fields(CORRUPT)
    table = atp_star(model, CLEAN, CORRUPT, curved_metric, nodes=["output", "v"], by="position")
    example = atp_star(model, CLEAN, CORRUPT, curved_metric, nodes=["output", "v"], by="example")
    total = {node: torch.zeros(3, 2, HEADS, LENGTH).double() for node in ("output", "v")}
    whole = {node: torch.zeros(3, 2, HEADS).double() for node in total}
    for dropped in range(3):
        leaves: dict[tuple[int, str], Tensor] = {}

        def cut(layer: int, name: str, x: Tensor) -> Tensor:
            if name == "z" and layer == dropped:
                return x.detach()
            if name in ("z", "v"):
                x.retain_grad()
                leaves[layer, name] = x
            return x

        curved_metric(model.explicit(CLEAN, cut)).backward()
        for (layer, name), x in leaves.items():
            if layer != dropped and x.grad is not None:
                node = "output" if name == "z" else name
                effect = ((corrupt[layer, name] - clean[layer, name]) * x.grad).sum(-1)
                total[node][layer] += effect.abs() / 2
                whole[node][layer] += effect.sum(-1).abs() / 2
    for node, found in total.items():
        assert found.abs().max() > 1e-3
        close(numbers(table, f"atp_star({node})", 3, HEADS, LENGTH), found.sum(1))
        close(numbers(example, f"atp_star({node})", 3, 2, HEADS), whole[node])
    plain = atp_star(model, CLEAN, CORRUPT, curved_metric, nodes="output", grad_drop=False)
    assert (plain["atp_star(output)"] - example["atp_star(output)"][: len(plain)]).abs().max() > 1e-3


def test_of_grouped_heads_a_key_head_is_the_sum() -> None:
    model = tiny_models.llama().double()
    x = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    y = x.clone()
    y[:, 3] = torch.tensor([9, 10])
    metric = log_probability(5)
    table = attribution_patching(model, x, y, metric, nodes=["k", "v", "output"])
    corrupt = hookattn.trace(model, y)
    for node in ("k", "v"):
        zeros: list[Tensor] = []

        def added(call: Any) -> Tensor:
            zeros.append(torch.zeros_like(call.value, requires_grad=True))
            return call.value + zeros[-1]  # type: ignore[no-any-return]

        run = hookattn.edited(model, x, edit.call(added, node))
        metric(run.output).backward()
        for layer in range(2):
            change = corrupt[layer].get(node) - run[layer].get(node).detach()
            wanted = (change * zeros[layer].grad).sum((0, 2, 3))
            found = numbers(table, f"attribution({node})", 2, 4)[layer].view(2, 2).sum(1)
            close(found, wanted, 1e-9)
            assert wanted.abs().max() > 1e-6


@pytest.mark.parametrize("by", ["head", "example"])
def test_the_viewer_takes_the_table_of_heads(by: str) -> None:
    model = Twin()
    trace = hookattn.trace(model, CLEAN)
    table = atp_star(model, CLEAN, CORRUPT, curved_metric, by=by)
    if by == "head":
        scores = scores_of(table, trace)
        assert {*scores} == {f"atp_star({node})" for node in NODES}
        assert scores["atp_star(k)"]["values"][2][1] == table["atp_star(k)"][2 * HEADS + 1]
    else:
        assert {"example", "head"} <= {*table.columns}


def test_what_does_not_fit() -> None:
    model = Twin()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"corrupt": CORRUPT[:, :4]}, MeasureError, "as many tokens"),
        ({"corrupt": CORRUPT[:1]}, MeasureError, "batch entries"),
        ({"nodes": "z"}, SelectionError, "nodes='z'"),
        ({"nodes": []}, SelectionError, "nodes="),
        ({"nodes": 3}, InputError, "nodes=3"),
        ({"by": "layer"}, SelectionError, "by='layer'"),
        ({"metric": lambda y: y.detach().sum()}, GradientError, "in no graph"),
    ]
    for change, error, words in cases:
        for analysis in (attribution_patching, atp_star):
            with pytest.raises(error, match=words):
                analysis(model, **{"clean": CLEAN, "corrupt": CORRUPT, "metric": curved_metric, **change})
    with pytest.raises(InputError, match="grad_drop='no'"):
        atp_star(model, CLEAN, CORRUPT, curved_metric, grad_drop="no")  # type: ignore[arg-type]
    training = tiny_models.llama().train()
    x = torch.randint(3, 60, (1, 5))
    with pytest.raises(MeasureError, match="eval mode"):
        attribution_patching(training, x, x, log_probability(3))


def test_positions_of_queries_and_of_keys_in_cross_attention() -> None:
    model = tiny_models.t5()
    x = torch.randint(3, 60, (1, 6), generator=torch.Generator().manual_seed(1))
    clean, corrupt = ({"input_ids": ids, "decoder_input_ids": x[:, :4]} for ids in (x, x.flip(1)))
    with pytest.raises(MeasureError, match="one after the other"):
        attribution_patching(model, clean, corrupt, log_probability(3), nodes=["q", "k"], by="position")
    keys = attribution_patching(model, clean, corrupt, log_probability(3), nodes="k", by="position")
    cross = keys[keys["kind"] == "cross"]
    assert cross.groupby(["call", "head"]).size().tolist() == [6] * 8
