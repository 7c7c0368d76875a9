"""What knocking out edges would do, against knock-outs that are run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn import edit
from hookattn.analyze import edge_attribution, log_probability
from hookattn.errors import MeasureError, SelectionError
from hookattn.render.head_scores import scores_of
from tests import tiny_models
from tests.analyze.causal.twin import HEADS, LENGTH, Twin, curved_metric, gradients, ids, logits_metric

ALL = 10_000


@pytest.mark.parametrize("sharpness", [1.0, 60.0, 1000.0])
def test_knock_outs_are_exact_where_what_follows_is_linear(sharpness: float) -> None:
    model, x = Twin(1, sharpness, linear=True), ids(0, 1)
    before = logits_metric(model(x)).item()
    table = edge_attribution(model, x, logits_metric, top=ALL)
    assert len(table) == HEADS * LENGTH * LENGTH
    assert table["knockout"].abs().is_monotonic_decreasing
    seen = 0
    for row in table.itertuples():
        if row.key > row.query:
            assert row.knockout == 0
            continue
        cut = edit.knockout(heads=[row.head], queries=[row.query], keys=[row.key])
        effect = logits_metric(hookattn.edited(model, x, cut).output).item() - before
        assert row.knockout == pytest.approx(effect, abs=1e-10)
        seen += 1
    assert seen == HEADS * LENGTH * (LENGTH + 1) // 2
    assert (table["knockout"] + table["weight"] * table["gradient"]).abs().max() > 1e-3, "nothing was renormalised"


def test_weights_and_gradients() -> None:
    model, x = Twin(), ids()
    slopes, kept = gradients(model, x, curved_metric), model.fields(x)
    table = edge_attribution(model, x, curved_metric, top=50)
    assert len(table) == 50
    for row in table.itertuples():
        at = (row.example, row.head, row.query, row.key)
        w, g = kept[row.layer, "weights"], slopes[row.layer, "weights"]
        assert row.weight == pytest.approx(float(w[at]), abs=1e-12)
        assert row.gradient == pytest.approx(float(g[at]), abs=1e-10)
        rest = w[at[:3]].clone()
        rest[row.key] = 0
        rest = rest / rest.sum() if row.query else rest
        assert row.knockout == pytest.approx(float(((rest - w[at[:3]]) * g[at[:3]]).sum()), abs=1e-10)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss"])
def test_of_models_that_are_not_linear_it_is_the_change_of_the_row(name: str) -> None:
    """Soft-caps, sliding windows, grouped heads and sinks: with the row that the model itself makes of a knock-out."""
    model, x = MODELS[name](), torch.randint(3, 60, (1, 7), generator=torch.Generator().manual_seed(1))
    metric = log_probability(5)
    table = edge_attribution(model, x, metric, top=ALL)
    clean = hookattn.trace(model, x)
    assert (clean[0].get("sinks") is not None) == (name == "gpt_oss")
    assert (clean[0].softcap is not None) == (name == "gemma2")
    for layer in range(2):
        of_layer = table[table["layer"] == layer]
        g = torch.zeros(4, 7, 7, dtype=torch.float64)
        g[of_layer["head"].tolist(), of_layer["query"].tolist(), of_layer["key"].tolist()] = torch.tensor(
            of_layer["gradient"].to_numpy()
        )
        for row in of_layer[:12].itertuples():
            cut = edit.knockout(layer=layer, heads=[row.head], queries=[row.query], keys=[row.key])
            changed = hookattn.edited(model, x, cut)[layer].weights - clean[layer].weights
            wanted = (changed[0, row.head, row.query].double() * g[row.head, row.query]).sum()
            assert row.knockout == pytest.approx(float(wanted), rel=1e-4, abs=1e-5)


def gemma2() -> Any:
    return tiny_models.build(
        "Gemma2ForCausalLM", "Gemma2Config", num_key_value_heads=2, head_dim=8, attn_logit_softcapping=5.0,
        sliding_window=4, query_pre_attn_scalar=8, **tiny_models.SMALL, **tiny_models.WORDS,
    )  # fmt: skip


def gpt_oss() -> Any:
    return tiny_models.build(
        "GptOssForCausalLM", "GptOssConfig", num_key_value_heads=2, head_dim=8, num_local_experts=2,
        num_experts_per_tok=1, sliding_window=4, **tiny_models.SMALL, **tiny_models.WORDS,
    )  # fmt: skip


MODELS: dict[str, Any] = {
    "gpt2": tiny_models.gpt2, "llama": tiny_models.llama, "gemma2": gemma2, "gpt_oss": gpt_oss,
}  # fmt: skip


def test_by_head_it_sums_magnitudes_up_and_the_viewer_takes_it() -> None:
    model, x = Twin(), ids()
    edges = edge_attribution(model, x, curved_metric, top=ALL)
    table = edge_attribution(model, x, curved_metric, by="head")
    sums = edges.assign(size=edges["knockout"].abs()).groupby(["call", "head"])["size"]
    assert table["edges"].tolist() == pytest.approx(sums.sum().tolist(), abs=1e-12)
    assert table["largest_edge"].tolist() == pytest.approx(sums.max().tolist(), abs=1e-12)
    scores = scores_of(table, hookattn.trace(model, x))
    assert {*scores} == {"edges", "largest_edge"}


def test_tokens_name_queries_and_keys() -> None:
    model = tiny_models.gpt2()

    class Encoded(dict[str, Tensor]):
        class encodings:
            tokens = ["a", "b", "c", "d", "e"]

        encodings = [encodings]  # type: ignore[assignment]

    table = edge_attribution(model, Encoded(input_ids=torch.arange(5)[None] + 3), log_probability(5), top=6)
    assert len(table) == 6
    for row in table.itertuples():
        assert (row.token, row.target) == ("abcde"[row.query], "abcde"[row.key])


def test_what_is_refused() -> None:
    model, x = Twin(), ids()
    with pytest.raises(SelectionError, match="top=0"):
        edge_attribution(model, x, curved_metric, top=0)
    with pytest.raises(SelectionError, match="by='position'"):
        edge_attribution(model, x, curved_metric, by="position")
    with pytest.raises(MeasureError, match="eval mode"):
        edge_attribution(tiny_models.llama().train(), torch.arange(5)[None] + 3, log_probability(3))
