"""Attention inside transforms of functions is listed or recorded, and what runs outside them is recorded as ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import hookattn
from tests.reference import draw


class Attends(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.fused = nn.Linear(16, 48), fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT * 8**-0.5).softmax(-1) @ v
        return out.transpose(1, 2).flatten(2)


class Ensemble(nn.Module):
    """A stem, and three copies of a module at once."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.stem, self.one = Attends(fused), Attends(fused)
        self.state = stack_module_state([Attends(fused) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return vmap(lambda p, b: functional_call(self.one, (p, b), (x,)))(*self.state)  # type: ignore[no-any-return]


class Derivative(nn.Module):
    def __init__(self, fused: bool, how: str) -> None:
        super().__init__()
        self.attention, self.how = Attends(fused), how

    def forward(self, x: Tensor) -> Any:
        if self.how == "grad":
            return grad(lambda y: self.attention(y).sum())(x)
        return jvp(self.attention, (x,), (torch.ones_like(x),))[0]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("fused", [True, False])
def test_several_at_once_are_listed(fused: bool) -> None:
    torch.manual_seed(0)
    model, x = Ensemble(fused), draw(2, 5, 16, seed=1)
    plain = model(x)
    with pytest.warns(hookattn.SkippedWarning):
        trace = hookattn.trace(model, x)
    assert torch.equal(trace.output, plain)
    assert [c.site.path for c in trace] == ["stem"] and trace.faithful and trace[0].weights.isfinite().all()
    assert {s.path for s in trace.skipped} == {"one"}
    assert any("torch.vmap" in s.reason for s in trace.skipped), trace.skipped


@pytest.mark.parametrize("how", ["grad", "jvp"])
def test_derivatives_are_recorded(how: str) -> None:
    torch.manual_seed(0)
    model, x = Derivative(False, how), draw(2, 5, 16, seed=1)
    plain = model(x)
    trace = hookattn.trace(model, x)
    assert torch.equal(trace.output, plain) and len(trace) == 1 and trace.faithful
    q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in model.attention.qkv(x).detach().chunk(3, -1))
    torch.testing.assert_close(trace[0].q.detach(), q)
    torch.testing.assert_close(trace[0].weights, (q @ k.mT * 8**-0.5).softmax(-1))
    torch.testing.assert_close(trace[0].output.detach(), (q @ k.mT * 8**-0.5).softmax(-1) @ v)
