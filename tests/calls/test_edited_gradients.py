"""A gradient that would go back through what an edit has set is refused; those beside it are given, and are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hookattn
from hookattn import edit
from hookattn.errors import GradientError
from tests.reference import draw


class Attend(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


def run(made: Any) -> hookattn.Call:
    q, k, v = (x.double().requires_grad_() for x in (draw(2, 3, 5, 4), draw(2, 3, 5, 4), draw(2, 3, 5, 4)))
    trace = hookattn.edited(Attend(), (q, k, v), made, gradients=True)
    trace.output.square().sum().backward()
    return trace[0]


@pytest.mark.parametrize("name", ["scores", "q", "k"])
def test_nothing_goes_back_through_weights_that_were_set(name: str) -> None:
    call = run(edit.zero("weights", heads=[1], batch=[0]))
    with pytest.raises(GradientError, match=r"edited: zero\(weights\) head 1, batch entry 0"):
        call.grad(name)
    assert call.grad("weights").shape == (2, 3, 5, 5)
    if name != "k":
        plain = run(edit.zero("weights", heads=[2]))
        for part in ({"heads": 0}, {"heads": 1, "batch": 1}):
            assert torch.allclose(call.at(**part).grad(name), plain.at(**part).grad(name), atol=1e-12)


@pytest.mark.parametrize("name", ["weights", "scores", "q", "k", "v"])
def test_nothing_goes_back_through_an_output_that_was_set(name: str) -> None:
    call = run(edit.scale("output", 0.5, heads=[1], queries=[2]))
    with pytest.raises(GradientError, match=r"edited: scale\(output\) head 1, query 2"):
        call.grad(name)
    if name not in ("k", "v"):
        assert call.at(heads=[0, 2]).grad(name).shape[1] == 2
        assert call.at(heads=1, queries=[0, 1, 3]).grad(name).shape[2] == 3


@pytest.mark.parametrize("made", [edit.knockout(heads=[1], queries=[2], keys=[0]), edit.set("q", 0.5, heads=[1])])
def test_what_the_kernel_was_given_has_gradients(made: Any) -> None:
    call = run(made)
    for name in ("weights", "scores", "q", "k", "v", "output"):
        assert call.grad(name).isfinite().all()
    hidden = call.grad("scores")[:, 1, 2, 0]
    assert bool((hidden == 0).all()) is (made.name == "knockout")
