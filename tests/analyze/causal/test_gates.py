"""Head importance, against autograd through the math written out and against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hookattn
from hookattn import edit
from hookattn.analyze import head_importance, log_probability, logit_difference
from hookattn.errors import EditError, GradientError, InputError, MeasureError
from hookattn.render.head_scores import scores_of
from tests import tiny_models
from tests.analyze.causal.twin import HEADS, Twin, curved_metric, ids


def by_gates(model: Twin, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    return curved_metric(model.explicit(x, lambda i, name, y: y * gates[i][:, None, None] if name == "z" else y))


def test_importance_is_the_gradient_of_gates() -> None:
    model, x = Twin(), ids()
    gates = torch.ones(3, HEADS, dtype=torch.float64, requires_grad=True)
    by_gates(model, x, gates).backward()
    model.zero_grad()
    table = head_importance(model, x, curved_metric)
    assert torch.allclose(torch.tensor(table["gate_gradient"]).view(3, HEADS), gates.grad, rtol=0, atol=1e-10)
    assert table["importance"].tolist() == pytest.approx(gates.grad.abs().flatten().tolist(), abs=1e-10)
    assert table["importance"].min() > 1e-3
    assert all(p.grad is None for p in model.parameters()), "the model's parameters got gradients"
    step = 1e-5
    for i in range(3):
        for h in range(HEADS):
            moved = torch.ones(3, HEADS, dtype=torch.float64)
            ends = []
            for sign in (1, -1):
                moved[i, h] = 1 + sign * step
                ends.append(by_gates(model, x, moved).item())
            slope = (ends[0] - ends[1]) / (2 * step)
            assert table["gate_gradient"][i * HEADS + h] == pytest.approx(slope, abs=1e-7)
    assert table.attrs["metric"] == pytest.approx(curved_metric(model(x)).item(), abs=1e-12)


def test_of_several_inputs_it_is_the_mean_of_magnitudes() -> None:
    model, several = Twin(), [ids(n, 1) for n in range(4)]
    single = [head_importance(model, x, curved_metric) for x in several]
    table = head_importance(model, several, curved_metric)
    signed = torch.tensor([t["gate_gradient"].tolist() for t in single], dtype=torch.float64)
    assert bool((signed.sum(0).abs() < signed.abs().sum(0) - 1e-6).any()), "no signs differ: the test says nothing"
    assert table["importance"].tolist() == pytest.approx(signed.abs().mean(0).tolist(), abs=1e-12)
    assert table["gate_gradient"].tolist() == pytest.approx(signed.mean(0).tolist(), abs=1e-12)
    other = head_importance(model, several[:2], [curved_metric, log_probability(3)])
    second = head_importance(model, several[1], log_probability(3))
    mean = (single[0]["importance"] + second["importance"]) / 2
    assert other["importance"].tolist() == pytest.approx(mean.tolist(), abs=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_transformers(name: str) -> None:
    options = {"kind": "BertForMaskedLM"} if name == "bert" else {}
    model = getattr(tiny_models, name)(**options)
    for p in model.parameters():
        p.requires_grad_(False)  # a frozen model has importances, too
    x = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    metric = logit_difference([5, 6], 8)
    table = head_importance(model, {"input_ids": x}, metric)
    gates = torch.ones(2, 4, requires_grad=True)
    metric(hookattn.edited(model, x, edit.scale("output", gates)).output).backward()
    assert table["gate_gradient"].tolist() == pytest.approx(gates.grad.flatten().tolist(), abs=1e-4)
    assert [*table["layer"]] == [0] * 4 + [1] * 4
    assert [*table["head"]] == [0, 1, 2, 3] * 2


def test_kinds_and_stacks_are_told_apart() -> None:
    model = tiny_models.t5()
    x = torch.randint(3, 60, (1, 6), generator=torch.Generator().manual_seed(1))
    table = head_importance(model, {"input_ids": x, "decoder_input_ids": x[:, :4]}, log_probability(7))
    places = set(zip(table["stack"], table["kind"], strict=True))
    assert places == {("encoder", "self"), ("decoder", "self"), ("decoder", "cross")}
    assert len(table) == 6 * 4


def test_the_viewer_takes_the_table() -> None:
    model, x = Twin(), ids()
    table = head_importance(model, x, curved_metric)
    scores = scores_of(table, hookattn.trace(model, x))
    assert scores["importance"]["values"][1][2] == table["importance"][HEADS + 2]
    assert "Michel" in scores["importance"]["description"]
    assert scores["importance"]["unit"] == "metric"


def test_what_there_is_no_gradient_of() -> None:
    model, x = Twin(), ids()
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda y: y, InputError, "scalar"),
        (lambda y: y.sum().item(), InputError, "scalar"),
        (lambda y: y.argmax().reshape(()), InputError, "scalar"),
        (lambda y: y.detach().sum(), GradientError, "in no graph"),
        (lambda y: (model.readout.weight * 2).sum(), GradientError, "no attention call"),
        (3, InputError, "a function of the model's output"),
        ([], InputError, "0 functions for 1 inputs"),
    ]
    for metric, error, words in cases:
        with pytest.raises(error, match=words):
            head_importance(model, x, metric)
    with pytest.raises(InputError, match=r"inputs=\[\]"):
        head_importance(model, [], curved_metric)
    with pytest.raises(MeasureError, match="are not those"):
        few = Twin(1)
        model.forward = lambda x: few(x) if x.shape[0] == 1 else Twin.forward(model, x)  # type: ignore[method-assign]
        model.few = few
        head_importance(model, [ids(), ids(0, 1)], curved_metric)
    with torch.inference_mode(), pytest.raises(GradientError, match="inference_mode"):
        head_importance(Twin(), x, curved_metric)
    with torch.no_grad():  # says nothing of what an analysis does inside
        assert head_importance(Twin(), x, curved_metric)["importance"].min() > 0


def test_attention_that_cannot_be_edited_is_named() -> None:
    class Opaque(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.ops.aten._native_multi_head_attention(
                x, x, x, 8, 2, self.attn.in_proj_weight, self.attn.in_proj_bias, self.attn.out_proj.weight,
                self.attn.out_proj.bias,
            )[0]  # fmt: skip
            return y

    with pytest.raises((EditError, GradientError)):
        head_importance(Opaque().eval(), torch.randn(1, 5, 8), lambda y: y.sum())
