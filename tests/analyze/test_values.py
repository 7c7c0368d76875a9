"""Weights by the size of what they weigh, against sums written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn.analyze.circuits.circuit import Circuit, Projection
from hookattn.analyze.circuits.find_weights import circuit
from hookattn.analyze.measures.entropy import Entropy
from hookattn.analyze.measures.values import OutputNorm, ValueNorm, norm_based, value_weighted
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.errors import FieldNotCaptured, MeasureError
from tests.analyze.build import CASES, Case, case
from tests.reference import draw

KINDS: dict[str, dict[str, Any]] = {**CASES, "cross": {"cross": True, "s": 7}, "float64": {"dtype": torch.float64}}
C = 11


def circuits(made: Case, width: int = 6, heads: int = 4) -> list[Circuit]:
    """A W_O for each call, as the whole model has it."""
    return [
        Circuit(c.site, c.index, heads, 2, o=Projection(draw(heads, width, C, seed=40 + c.index), None, "equal"))
        for c in made.trace
    ]


def vectors(made: Case, i: int, projected: bool) -> Tensor:
    """B H S E or B H S C: the vector that each weight is of, head by head."""
    call = made.trace[i]
    v, (b, h) = call.v.double(), made.weights[i].shape[:2]
    out = []
    for x in range(b):
        for y in range(h):
            group = call.kv_heads[y] if call.kv_heads is not None else y // (h // v.shape[1])
            head = call.heads[y] if call.heads is not None else y
            w_o = circuits(made)[i].W_O[head].double()
            out.append(v[x, group] @ w_o if projected else v[x, group])
    return torch.stack(out).unflatten(0, (b, h))


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_means_are_those_of_the_sums(kind: str, projected: bool) -> None:
    made = case(**KINDS[kind])
    model = circuits(made)
    raw = norm_based(made.trace, model, normalise=False) if projected else value_weighted(made.trace, normalise=False)
    shares = norm_based(made.trace, model) if projected else value_weighted(made.trace)
    table = (OutputNorm(model) if projected else ValueNorm())(made.trace, real=made.real)
    for i, weights in enumerate(made.weights):
        of = vectors(made, i, projected)
        want = torch.zeros_like(weights)
        for j in range(want.shape[3]):  # ‖w_ij v_j‖, the vector itself being formed
            want[..., j] = (weights[..., j, None] * of[:, :, None, j]).norm(dim=-1)
        torch.testing.assert_close(raw[i].weights.double(), want, rtol=1e-5, atol=1e-5)
        total = want.sum(-1, keepdim=True)
        share = torch.where(total > 0, want / total, 0.0)
        torch.testing.assert_close(shares[i].weights.double(), share, rtol=1e-5, atol=1e-6)
        for y, mine in enumerate(table[table["call"] == i].iloc[:, -1]):
            each = [want[x, y, r].sum() for x in range(len(want)) for r in range(want.shape[2]) if made.rows[x, r]]
            assert mine == pytest.approx(float(sum(each)) / len(each), rel=1e-5)


def test_the_trace_goes_into_measures_and_files(tmp_path: Any) -> None:
    made = case(sinks=True, pad=(0, 3))
    shares = value_weighted(made.trace)
    values = Entropy()(shares, real=made.real)["entropy"]
    for i, weights in enumerate(made.weights):
        w = weights * vectors(made, i, False).norm(dim=-1).unsqueeze(2)
        w = w / w.sum(-1, keepdim=True).clamp_min(1e-30)
        entropy = -torch.xlogy(w, w).sum(-1)
        rows = made.rows.unsqueeze(1).expand(entropy.shape)
        want = (entropy * rows).sum((0, 2)) / rows.sum((0, 2))
        assert values[i * 4 : i * 4 + 4].tolist() == pytest.approx(want.tolist(), rel=1e-5)
    shares.save(tmp_path / "shares.safetensors")
    back = hookattn.load(tmp_path / "shares.safetensors")
    assert torch.equal(back[1].weights, shares[1].weights)
    assert "divided by its sum" in back[1].notes[-1]


def test_values_of_one_size_change_nothing() -> None:
    made = case(layers=1)
    made.trace[0].fields["v"] = torch.nn.functional.normalize(made.trace[0].v, dim=-1) * 3
    torch.testing.assert_close(value_weighted(made.trace)[0].weights, made.trace[0].weights)
    assert ValueNorm()(made.trace, real=made.real)["value_norm"].tolist() == pytest.approx([3.0] * 4)


def test_half_precision_does_not_overflow() -> None:
    made = case(layers=1, dtype=torch.float16)
    made.trace[0].fields["v"] = made.trace[0].v * 2e4  # squares are far beyond float16
    assert ValueNorm()(made.trace)["value_norm"].between(1e4, 1e5).all()


@torch.no_grad()
def test_on_a_model_the_vectors_sum_to_what_its_attention_writes() -> None:
    """‖w_ij f(x_j)‖ from the trace, against the vectors themselves, which have to add up to the module's own result."""
    model, tokens = load_pretrained(), example_tokens(0)
    results: list[Tensor] = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda _, a, out: results.append(out))
    trace = hookattn.trace(model, tokens)
    written, found = results[:2], circuit(model, tokens)
    norms = norm_based(trace, found, normalise=False)
    for i, call in enumerate(trace):
        out = model.blocks[i].attn.out
        f = call.v @ out.weight.t().reshape(4, 16, 64)
        parts = call.weights.unsqueeze(-1) * f.unsqueeze(2)
        torch.testing.assert_close(parts.sum((1, 3)) + out.bias, written[i], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(norms[i].weights, parts.norm(dim=-1), rtol=1e-3, atol=1e-4)


def test_what_is_missing_or_does_not_fit_is_said() -> None:
    made = case(layers=1)
    some = case(layers=1, keep=("weights", "mask"))
    with pytest.raises(FieldNotCaptured, match=r"value_norm: 'v' of layers\.0\.attn was not captured"):
        ValueNorm()(some.trace)
    site = made.trace[0].site
    for model, message in (
        ([], r"call 0 \(layers\.0\.attn, step 0\) has no circuit among the 0 given"),
        ([Circuit(site, 0, 4, 2, missing={"o": "a gate"})], r"layers\.0\.attn: W_O is not known: a gate"),
        (circuits(made, width=5), "values of width 6, and its circuit of 5"),
        (circuits(made, heads=6), r"has heads \[0, 1, 2, 3\], and its circuit has 6"),
    ):
        with pytest.raises(MeasureError, match=message):
            norm_based(made.trace, model)
    assert OutputNorm(circuits(made)).key == "output_norm"
