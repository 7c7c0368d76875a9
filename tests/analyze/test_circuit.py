"""The weights of heads, found by values in attention written in many ways, and what is said where they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hookattn.analyze.circuits.find_weights import circuit
from hookattn.errors import MeasureError
from tests.analyze.test_circuit_models import check, heads
from tests.reference import draw


class Written(nn.Module):
    """Attention in the hand of whoever writes it: ``project`` and ``finish`` are given."""

    def __init__(self, project: Callable[..., Any], finish: Callable[..., Any] | None = None, heads: int = 3):
        super().__init__()
        g = torch.Generator().manual_seed(5)
        for name, shape in {
            "fused": (24, 3 * heads * 6), "bias": (3 * heads * 6,), "split": (heads, 24, 6), "down": (24, 2),
            "up": (2, heads * 6), "out": (heads * 6, 24), "table": (heads, 6, 24),
        }.items():  # fmt: skip
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=g)))
        self.heads, self.project, self.finish = heads, project, finish or (lambda m, o: merge(o) @ m.out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.finish(self, F.scaled_dot_product_attention(*self.project(self, x)))
        return out


def merge(o: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(2)


def chunks(y: Tensor, n: int) -> list[Tensor]:
    return [z.unflatten(-1, (n, -1)).transpose(1, 2) for z in y.chunk(3, -1)]


def fused(m: Written, x: Tensor) -> Any:
    return chunks(x @ m.fused, m.heads)


X = draw(2, 9, 24, seed=8)


def test_a_product_and_a_bias_apart() -> None:
    model = Written(lambda m, x: chunks(x @ m.fused + m.bias, m.heads))
    found = circuit(model, X)[0]
    wants = [heads(w, 3) for w in model.fused.t().split(18)]
    check(found, ("affine",) * 3 + ("equal",), *wants, model.out.detach().view(3, 6, 24), bias=model.bias.split(18))
    assert torch.equal(found.W_V, wants[2])  # the factor is 1, and so the weights are the model's own bits


def test_columns_in_an_order_of_their_own() -> None:
    order = torch.randperm(54, generator=torch.Generator().manual_seed(1))
    model = Written(lambda m, x: chunks((x @ m.fused)[..., order], m.heads))
    wants = [heads(w, 3) for w in model.fused.t()[order].split(18)]
    check(circuit(model, X)[0], ("equal",) * 4, *wants, model.out.detach().view(3, 6, 24))


def test_einsum_of_weights_for_each_head() -> None:
    model = Written(
        lambda m, x: [torch.einsum("btc,hcd->bhtd", x, w) for w in (m.split, 2 * m.split, m.split.flip(0))],
        lambda m, o: torch.einsum("bhtd,hdc->btc", o, m.table),
    )
    w = model.split.detach()
    found = circuit(model, X)[0]
    check(found, ("equal",) * 4, w, 2 * w, w.flip(0), model.table.detach())


def test_a_factor_for_each_head_is_folded_in() -> None:
    gain = torch.tensor([0.5, 3.0, -2.0]).view(1, 3, 1, 1)
    model = Written(
        lambda m, x: [
            f(y) for f, y in zip((lambda q: q / 7, lambda k: k, lambda v: v * gain), fused(m, x), strict=True)
        ],
        lambda m, o: merge(o * gain) @ m.out,
    )
    q, k, v = (heads(w, 3) for w in model.fused.t().split(18))
    out = model.out.detach().view(3, 6, 24) * gain.view(3, 1, 1)
    check(circuit(model, X)[0], ("affine", "equal", "affine", "affine"), q / 7, k, v * gain.view(3, 1, 1), out)


def test_a_factor_is_of_the_bias_too() -> None:
    def project(m: Written, x: Tensor) -> Any:
        q, k, v = chunks(F.linear(x, m.fused.t(), m.bias), m.heads)
        return q / 7, k, v

    model = Written(project)
    q, k, v = (heads(w, 3) for w in model.fused.t().split(18))
    bq, bk, bv = model.bias.split(18)
    out = model.out.detach().view(3, 6, 24)
    check(circuit(model, X)[0], ("affine", "equal", "equal", "equal"), q / 7, k, v, out, bias=(bq / 7, bk, bv))


def test_an_output_that_is_only_a_part_of_what_the_projection_reads() -> None:
    model = Written(fused, lambda m, o: torch.cat([X, merge(o)], -1) @ torch.cat([m.fused[:, :24], m.out]))
    found = circuit(model, X)[0]
    assert found.o is not None and torch.equal(found.W_O, model.out.detach().view(3, 6, 24))


def test_rotations_that_do_not_cancel_are_not_taken_for_positions() -> None:
    turn, _ = torch.linalg.qr(draw(6, 6, seed=4))
    other, _ = torch.linalg.qr(draw(6, 6, seed=5))

    def turned(by_q: Tensor, by_k: Tensor) -> Any:
        return circuit(
            Written(lambda m, x: [y @ r for y, r in zip(fused(m, x), (by_q, by_k, torch.eye(6)), strict=True)]), X
        )[0]

    q, k = (heads(w, 3) for w in Written(fused).fused.t().split(18)[:2])
    same = turned(turn, turn)
    assert (same.q.basis, same.k.basis) == ("norms", "norms")
    assert torch.equal(same.W_Q, q) and torch.equal(same.W_K, k)
    apart = turned(turn, other)
    assert list(apart.missing) == ["q", "k"]
    assert "do not have the product of the projections" in apart.missing["k"]


def test_an_input_that_is_written_over_afterwards() -> None:
    def project(m: Written, x: Tensor) -> Any:
        x = x.clone()
        made = fused(m, x)
        x.zero_()
        return made

    assert not circuit(Written(project), X)[0].missing


@pytest.mark.parametrize(
    ("project", "finish", "missing"),
    [
        (
            lambda m, x: [q + (x @ m.down @ m.up).unflatten(-1, (3, 6)).transpose(1, 2) for q in fused(m, x)],
            None,
            "qkv",
        ),
        (lambda m, x: [y / y.norm(dim=-1, keepdim=True) for y in fused(m, x)], None, "qkv"),
        (lambda m, x: [y.roll(1, 2) for y in fused(m, x)], None, "qkv"),
        (fused, lambda m, o: (merge(o) * torch.sigmoid(merge(o))) @ m.out, "o"),
        (fused, lambda m, o: merge(o), "o"),
        (fused, lambda m, o: merge(o) @ (m.out + o.mean()), "o"),
    ],
    ids=["adapter", "norm", "tokens moved", "gate", "no projection", "weights of activations"],
)
def test_what_lies_between_is_said(project: Any, finish: Any, missing: str) -> None:
    found = circuit(Written(project, finish), X)[0]
    assert "".join(found.missing) == missing
    for name in missing:
        with pytest.raises(MeasureError, match=f"W_{name.upper()} is not known: no product"):
            found.projection(name)


def test_columns_that_these_inputs_cannot_tell_apart() -> None:
    model = Written(fused)
    with torch.no_grad():
        model.fused[1:, 40] = model.fused[1:, 45]  # they differ in the first feature alone, which is always 0
    blind = X.clone()
    blind[..., 0] = 0
    assert list(circuit(model, blind)[0].missing) == ["v"]
    assert not circuit(model, X)[0].missing


def test_few_tokens_prove_equality_alone() -> None:
    model = Written(lambda m, x: [y * f for y, f in zip(fused(m, x), (2, 1, 1), strict=True)])
    found = circuit(model, X[:1, :5])[0]
    assert list(found.missing) == ["q"]
    assert "5 tokens are fewer than" in found.missing["q"]
    assert not circuit(model, X[:1, :8])[0].missing


def test_weights_that_are_cast_for_the_product() -> None:
    model = Written(fused)
    with torch.autocast("cpu", torch.bfloat16):
        found = circuit(model, X)[0]
    assert not found.missing and found.v is not None
    assert (found.v.basis, found.v.name, found.W_V.dtype) == ("equal", "", torch.bfloat16)
    assert torch.equal(found.W_V, heads(model.fused.t().split(18)[2], 3).bfloat16())


def test_inference_mode_and_a_repr_that_tells() -> None:
    model = Written(fused)
    with torch.inference_mode():
        found = circuit(model, X)[0]
    assert torch.equal(found.W_V, heads(model.fused.t().split(18)[2], 3))
    assert repr(found) == (
        "Circuit(<model>, layer 0: q (3, 24, 6) equal fused; k (3, 24, 6) equal fused; v (3, 24, 6) equal fused; "
        "o (3, 6, 24) equal out)"
    )
