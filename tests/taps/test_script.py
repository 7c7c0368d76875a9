"""Functions and modules of torch.jit inside a model: followed beside their compiled code, or said not to be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn.taps.script import attending
from tests.reference import assert_untouched, causal, draw, same_bits, snapshot

B, T, H, D = 2, 5, 2, 8
X = draw(B, T, H * D, seed=1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * 0.35, -1), v)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=0.35)


def softmax(scores: Tensor) -> Tensor:
    mask = torch.ones(scores.shape[-2], scores.shape[-1], dtype=torch.bool).tril()
    return torch.softmax((scores * 0.35).masked_fill(~mask, -1e9), -1)


def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * 0.35, -1)
    return torch.matmul(weights, v), weights


def named(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * 0.35, -1)
    return {"output": torch.matmul(weights, v), "weights": weights}


def random(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * 0.35, -1)
    return torch.matmul(torch.dropout(weights, 0.5, True), v)


def writes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q.mul_(0.35), k.transpose(-1, -2)), -1), v)


def heads(x: Tensor, projection: nn.Module) -> Any:
    return [y.unflatten(-1, (H, D)).transpose(1, 2).clone() for y in projection(x).chunk(3, -1)]


class Attends(nn.Module):
    def __init__(self, function: Any, kind: str = "whole") -> None:
        super().__init__()
        self.projection, self.kind, self.function = nn.Linear(H * D, 3 * H * D), kind, function

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(x, self.projection)
        out = self.function(q @ k.mT) @ v if self.kind == "softmax" else self.function(q, k, v)
        if isinstance(out, dict):
            out = out["output"]
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2).flatten(2)


def expected(m: Attends, mask: Tensor | None = None) -> Tensor:
    q, k, _ = heads(X.double(), m.projection.double())
    scores = q @ k.mT * 0.35
    m.projection.float()
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)


def compiled(function: Any, how: str) -> Any:
    if how == "scripted":
        return torch.jit.script(function)
    given = [draw(B, H, T, D)] * 3 if function is not softmax else [draw(B, H, T, T)]
    return torch.jit.trace(function, given)


@pytest.mark.parametrize("how", ["scripted", "traced"])
@pytest.mark.parametrize("function", [whole, fused, both, softmax])
def test_what_it_was_made_from_is_followed(function: Any, how: str) -> None:
    torch.manual_seed(0)
    m = Attends(compiled(function, how), function.__name__).train()
    before, plain = snapshot(m), m(X)
    trace = hookattn.trace(m, X, verify="full")
    assert_untouched(m, before)
    assert same_bits(trace.output, plain) and trace.faithful and not trace.skipped
    (call,) = trace
    weights = expected(m, causal(T) if function is softmax else None)
    torch.testing.assert_close(call.weights.double(), weights, atol=1e-6, rtol=1e-5)
    assert call.normalizer == "softmax" and call.site.path == "" and "guessed" not in call.basis.values()


def test_a_result_with_names_is_followed_as_well() -> None:
    torch.manual_seed(0)
    m = Attends(torch.jit.script(named)).eval()
    plain = m(X)
    trace = hookattn.trace(m, X, verify="full")
    assert same_bits(trace.output, plain) and trace.faithful and not trace.skipped
    torch.testing.assert_close(trace[0].weights.double(), expected(m), atol=1e-6, rtol=1e-5)


def test_gradients_go_through_the_compiled_code() -> None:
    torch.manual_seed(0)
    m, x = Attends(torch.jit.script(whole)), X.clone().requires_grad_()
    (m(x) ** 2).sum().backward()
    plain, x.grad = x.grad, None
    (hookattn.trace(m, x).output ** 2).sum().backward()
    assert plain is not None and same_bits(x.grad, plain)


class Scripts(nn.Module):
    """A plain attention, and one in code compiled by torch.jit."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.plain, self.part = Attends(whole), part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.plain(x))  # type: ignore[no-any-return]


class Written(nn.Module):
    """An attention that can be scripted as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projection(x).chunk(3, -1)
        return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)), -1), v)


@pytest.mark.parametrize("kind", ["random", "writes", "changed", "scripted module", "traced module"])
def test_what_cannot_be_followed_is_listed(kind: str) -> None:
    """It draws random numbers, writes to its arguments, is not what it was made from, or has no Python function."""
    if kind.endswith("module"):
        part = Written()
        part = torch.jit.script(part) if kind == "scripted module" else torch.jit.trace(part, X)
    elif kind == "changed":
        function = torch.jit.script(whole)
        function._torchdynamo_inline = lambda q, k, v: whole(q * 1.0001, k, v)
        part = Attends(function)
    else:
        part = Attends(torch.jit.script({"random": random, "writes": writes}[kind]))
    m = Scripts(part)
    torch.manual_seed(0)
    plain = m(X)
    torch.manual_seed(0)
    with pytest.warns(hookattn.SkippedWarning):
        trace = hookattn.trace(m, X)
    assert same_bits(trace.output, plain)
    assert [c.site.path for c in trace] == ["plain"]
    (skipped,) = trace.skipped
    assert skipped.path == "part" and "torch.jit (softmax, matmul)" in skipped.reason


def test_what_does_not_attend_costs_and_says_nothing() -> None:
    calls = []

    def gelu(x: Tensor) -> Tensor:
        calls.append(1)
        return x * torch.sigmoid(1.702 * x)

    function = torch.jit.trace(gelu, X)
    calls.clear()
    m = nn.Sequential(Attends(whole), nn.Module())
    m[1].forward = lambda x: function(x)
    trace = hookattn.trace(m, X)
    assert len(trace) == 1 and not trace.skipped and not calls


def test_which_graphs_attend() -> None:
    graph = "%1 = aten::{}(%0)"
    assert attending(graph.format("matmul") + graph.format("softmax")) == ("softmax", "matmul")
    assert attending(graph.format("scaled_dot_product_attention")) == ("scaled_dot_product_attention",)
    assert attending(graph.format("softmax")) == attending(graph.format("bmm") * 2) == ()
