"""Axes that happen to be of one size: shape alone is no evidence of what an operation did to scores or weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference import assert_close, check_call, draw, heads, merge, paths, trace_checked

B, H, D = 2, 4, 4
E = H * D


class Attention(nn.Module):
    """Plain attention; ``after`` is what is done with the output."""

    def __init__(self, n: int = E, h: int = H) -> None:
        super().__init__()
        self.qkv, self.proj, self.h = nn.Linear(n, 3 * n), nn.Linear(n, n), h

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (heads(t, self.h) for t in self.qkv(x).chunk(3, -1))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        return self.proj(merge((q @ k.mT / 2).softmax(-1) @ v))


class Assign(nn.Module):
    """Each patch is assigned to a group: a softmax over the groups, renormalised over the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.Parameter(draw(1, 6, E, seed=3))
        self.k, self.v, self.norm, self.proj = (nn.Linear(E, E), nn.Linear(E, E), nn.LayerNorm(E), nn.Linear(E, E))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.groups.expand(len(x), -1, -1) @ self.k(x).mT * E**-0.5).softmax(-2)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
        return self.proj(self.norm(self.groups + weights @ self.v(x)))


class Second(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = first, second or Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def traced(model: nn.Module, x: Tensor, warns: bool = False, guesses: bool = False) -> Any:
    import hookattn

    with torch.no_grad():
        return trace_checked(hookattn.trace, model.eval(), x, warns=warns, guesses=guesses, verify="full")


@pytest.mark.parametrize("t", [5, 6, H, E])
def test_an_assignment_to_groups_before_attention(t: int) -> None:
    """With as many patches as features, the product with the values has the shape of the weights."""
    torch.manual_seed(0)
    model, x = Second(Assign()), draw(B, t, E, std=1.5)
    trace = traced(model, x, guesses=True)  # groups are a parameter as they are: queries, or heads of one query each
    assert paths(trace.calls) == ["first", "second"]
    assert not trace.skipped
    assert [call.normalizer for call in trace] == ["softmax over queries", "softmax"]
    with torch.no_grad():
        q, k, v = model.second.parts(model.first(x))
        patches = model.first.v(x)
    check_call(trace[1], q=q, k=k, v=v, scale=0.5)
    assert torch.equal(trace[0].v, patches[:, None])
    assert trace[0].weights.shape == (B, 1, 6, t)


class Transposed(nn.Module):
    """Values spread by the weights' columns: a sum over the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT / 4).softmax(-1).mT @ v


class Features(nn.Module):
    """The weights, or the scores, as features of a linear map."""

    def __init__(self, t: int, scores: bool) -> None:
        super().__init__()
        self.qkv, self.scores, self.map = nn.Linear(E, 2 * E), scores, nn.Linear(t, t)
        self.back = nn.Linear(t, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qkv(x).chunk(2, -1)
        scores = q @ k.mT / 4
        return self.back(self.map(scores).softmax(-1) if self.scores else self.map(scores.softmax(-1)))


@pytest.mark.parametrize("t", [5, H, E])
@pytest.mark.parametrize("kind", ["transposed", "weights", "scores"])
def test_what_is_no_attention_does_not_reach_the_next_layer(kind: str, t: int) -> None:
    torch.manual_seed(1)
    first = Transposed() if kind == "transposed" else Features(t, kind == "scores")
    model, x = Second(first), draw(B, t, E, std=1.5)
    trace = traced(model, x, warns=True)
    # Weights turned round sum over the queries, which are the keys of that sum then.
    assert paths(trace.calls) == ["first", "second"] if kind == "transposed" else ["second"]
    with torch.no_grad():
        q, k, v = model.second.parts(model.first(x))
    check_call(trace[-1], q=q, k=k, v=v, scale=0.5)
    assert not trace[-1].notes
    if kind == "transposed":
        with torch.no_grad():
            q, k, v = (y[:, None] for y in model.first.qkv(x).chunk(3, -1))
        assert trace[0].normalizer == "softmax over queries"
        assert_close(trace[0].weights, (q @ k.mT / 4).softmax(-1).mT, 1e-6, "weights")
        assert torch.equal(trace[0].q, k)
    elif kind == "weights":  # a softmax over features is none of ours
        assert {item.path for item in trace.skipped} == {"first"}


@pytest.mark.parametrize(("b", "t"), [(4, 4), (16, 16), (4, 16), (16, 4)])
def test_every_size_the_same(b: int, t: int) -> None:
    torch.manual_seed(2)
    model, x = Second(Attention(), Attention()), draw(b, t, E, std=1.5)
    trace = traced(model, x)
    assert paths(trace.calls) == ["first", "second"]
    with torch.no_grad():
        for call, module, given in zip(trace, (model.first, model.second), (x, model.first(x)), strict=True):
            q, k, v = module.parts(given)
            check_call(call, q=q, k=k, v=v, scale=0.5)


class Talking(Attention):
    """Heads mixed after the softmax, by a linear map or a product with a matrix, where T == S == H."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.mix = how, nn.Linear(H, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        weights = (q @ k.mT / 2).softmax(-1)
        if self.how == "linear":
            weights = self.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif self.how == "conv":
            weights = nn.functional.conv2d(weights, self.mix.weight[:, :, None, None])
        else:
            weights = torch.einsum("bhts,gh->bgts", weights, self.mix.weight)
        return self.proj(merge(weights @ v))


@pytest.mark.parametrize("how", ["linear", "conv", "einsum"])
def test_heads_are_mixed_where_everything_is_of_their_number(how: str) -> None:
    torch.manual_seed(3)
    model, x = Second(Attention(), Talking(how)), draw(H, H, E, std=1.5)
    trace = traced(model, x, warns=True)
    assert paths(trace.calls) == ["first", "second"]
    call = trace[1]
    with torch.no_grad():
        q, k, v = model.second.parts(model.first(x))
    assert torch.equal(call.q, q) and torch.equal(call.k, k) and torch.equal(call.v, v)
    assert torch.equal(call.weights, (q @ k.mT / 2).softmax(-1))
    assert call.mixed and "heads" in " ".join(call.notes)
