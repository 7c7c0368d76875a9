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


def attended(m: Attends, state: Any, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q, weights and output of one module with these parameters, in float64."""
    y = x.double() @ state["qkv.weight"].double().mT + state["qkv.bias"].double()
    q, k, v = (z.unflatten(-1, (2, 8)).transpose(-3, -2) for z in y.chunk(3, -1))
    scores = q @ k.mT * 8**-0.5
    weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
    return q, weights, weights @ v


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach().double(), expected.detach(), atol=2e-6, rtol=2e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("fused", [True, False])
def test_several_at_once_are_entries_of_the_batch(fused: bool) -> None:
    """Three members of an ensemble, on the same two inputs."""
    torch.manual_seed(0)
    model, x = Ensemble(fused), draw(2, 5, 16, seed=1)
    plain = model(x)
    trace = hookattn.trace(model, x, verify="full")
    assert torch.equal(trace.output, plain)
    assert [c.site.path for c in trace] == ["stem", "one"] and trace.faithful and not trace.skipped
    call, stem = trace[1], model.stem(x)
    assert call.shape == "B6 H2 T5 S5"
    assert "inside torch.vmap: the batch is 3 examples of 2 entries" in call.notes
    for i in range(3):
        state = {name: values[i] for name, values in model.state[0].items()}
        q, weights, output = attended(model.one, state, stem)
        part = slice(2 * i, 2 * i + 2)
        close(call.q[part], q)
        close(call.weights[part], weights)
        close(call.output[part], output)


class Mapped(nn.Module):
    """An attention of one example, mapped over two dimensions of its input."""

    def __init__(self, mask: str, around: str) -> None:
        super().__init__()
        self.attention, self.mask, self.around = Attends(True), mask, around

    def one(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(0, 1) for y in self.attention.qkv(x).chunk(3, -1))
        mask: Tensor | None = keep
        if self.mask == "added":
            mask = torch.zeros(5, 5).masked_fill(~keep, -torch.inf)
        elif self.mask == "written out":
            scores = (q @ k.mT * 8**-0.5).masked_fill(~keep, -torch.inf)
            return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1).flatten(1)

    def forward(self, x: Tensor, keep: Tensor) -> Any:
        if self.around == "grad in it":
            return vmap(vmap(grad(lambda y, m: self.one(y, m).sum()), (0, None)), (1, 0), 1)(x, keep)
        return vmap(vmap(self.one, (0, None)), (1, 0), 1)(x, keep)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("around", ["", "grad in it"])
@pytest.mark.parametrize("mask", ["bool", "added", "written out"])
def test_transforms_in_one_another(mask: str, around: str) -> None:
    """Mapped over the second dimension, with a mask for each entry of it, and then over the first, where it is one."""
    torch.manual_seed(0)
    model, x = Mapped(mask, around), draw(3, 2, 5, 16, seed=1)
    keep = (draw(2, 5, 5, seed=2) > 0) | torch.eye(5, dtype=torch.bool)
    plain = model(x, keep)
    trace = hookattn.trace(model, (x, keep), verify="full")
    assert torch.equal(trace.output, plain) and trace.faithful and not trace.skipped
    (call,) = trace
    assert call.notes[-1] == "inside torch.vmap: the batch is 2 x 3 examples of 1 entry"
    for i in range(6):
        outer, inner = divmod(i, 3)
        q, weights, output = attended(
            model.attention, dict(model.attention.named_parameters()), x[inner, outer], keep[outer]
        )
        close(call.q[i], q)
        close(call.weights[i], weights)
        close(call.output[i], output)
        assert torch.equal(call.mask.expand_as(call.weights)[i, 0], keep[outer])


def test_what_depends_on_values_is_listed() -> None:
    """A rule that has to look at values cannot, where they are several; the model goes on."""

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attends(False)

        def forward(self, x: Tensor) -> Tensor:
            def one(y: Tensor) -> Tensor:
                q, k, v = (z.unflatten(-1, (2, 8)).transpose(0, 1) for z in self.attention.qkv(y).chunk(3, -1))
                return ((q @ k.mT) / y.abs().mean()).softmax(-1) @ v

            return vmap(one)(x)  # type: ignore[no-any-return]

    model, x = Looks(), draw(2, 5, 16, seed=1)
    plain = model(x)
    with pytest.warns(hookattn.SkippedWarning):
        trace = hookattn.trace(model, x)
    assert torch.equal(trace.output, plain) and not len(trace) and "vmap" in trace.skipped[0].reason


def test_functionalize_is_listed() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attends(True)

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.functionalize(self.attention)(x)  # type: ignore[no-any-return]

    model, x = Functional(), draw(2, 5, 16, seed=1)
    with pytest.warns(hookattn.SkippedWarning, match="functionalize"):
        assert torch.equal(hookattn.trace(model, x).output, model(x))


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
