"""Masks as whatever is written over scores, and sinks as whatever is added to the sum of exponentials."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hookattn
from hookattn.taps.eager.axis_history import Atom, extent_of, resized, sizes
from tests.reference import causal, check_call, draw, trace_checked

B, H, T, D, E = 2, 3, 6, 5, 15
SCALE = 0.4


class Host(nn.Module):
    def __init__(self, attend: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.attend = nn.Linear(E, 3 * E), attend
        self.sink = nn.Parameter(draw(H, seed=7))
        self.one = nn.Parameter(draw(1, seed=8)[0])

    def parts(self, x: Tensor) -> list[Tensor]:
        return [y.unflatten(-1, (H, D)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self, *self.parts(x)).transpose(1, 2).flatten(2)


def traced(attend: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> tuple[Any, Host, list[Tensor], Tensor]:
    torch.manual_seed(1)
    model, x = Host(attend), draw(B, T, E, std=1.5)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, x, verify="full")
        parts = model.parts(x)
    assert len(trace) == 1 and not trace.skipped, [item.reason for item in trace.skipped]
    return trace[0], model, parts, trace.output.unflatten(-1, (H, D)).transpose(1, 2)


HIDDEN = ~causal(T)
FILLS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "masked_fill": lambda s, v: s.masked_fill(HIDDEN, v),
    "masked_fill of a tensor": lambda s, v: s.masked_fill(HIDDEN, torch.tensor(v)),
    "where a number": lambda s, v: torch.where(HIDDEN, v, s),
    "where a tensor of one": lambda s, v: torch.where(HIDDEN, torch.tensor(v), s),
    "where a row": lambda s, v: torch.where(~HIDDEN, s, torch.full((T,), v)),
    "where a whole tensor": lambda s, v: torch.where(~HIDDEN, s, torch.full_like(s, v)),
}


@pytest.mark.parametrize("value", [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4, -99.0])
@pytest.mark.parametrize("how", FILLS)
def test_what_is_written_over_scores_hides_them_where_no_weight_is_left(how: str, value: float) -> None:
    call, _, (q, k, v), output = traced(lambda m, q, k, v: FILLS[how](q @ k.mT * SCALE, value).softmax(-1) @ v)
    check_call(call, q=q, k=k, v=v, scale=SCALE, mask=~HIDDEN, output=output)
    assert not call.own_scores


@pytest.mark.parametrize("value", [-5.0, 0.0, 3.0])
@pytest.mark.parametrize("how", FILLS)
def test_what_leaves_weights_is_no_mask(how: str, value: float) -> None:
    call, _, (q, k, v), output = traced(lambda m, q, k, v: FILLS[how](q @ k.mT * SCALE, value).softmax(-1) @ v)
    assert call.mask.all() and call.own_scores
    torch.testing.assert_close(call.scores, FILLS[how](q @ k.mT * SCALE, value))
    torch.testing.assert_close(call.weights, FILLS[how](q @ k.mT * SCALE, value).softmax(-1))
    assert torch.equal(call.output, output) and torch.equal(call.q, q) and torch.equal(call.v, v)


def test_a_tensor_of_several_numbers_is_a_mask_if_the_largest_is() -> None:
    low = -1e9 * (1 + torch.arange(T).float())
    call, _, (q, k, v), output = traced(lambda m, q, k, v: torch.where(~HIDDEN, q @ k.mT * SCALE, low).softmax(-1) @ v)
    check_call(call, q=q, k=k, v=v, scale=SCALE, mask=~HIDDEN, output=output)
    assert not call.own_scores


# ------------------------------------------------------------------------------------------------ sinks


def per_head(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    made = (q @ k.mT * SCALE).exp()
    return made @ v / (made.sum(-1, keepdim=True) + m.sink.exp()[:, None, None])


def one_for_all(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    made = (q @ k.mT * SCALE).exp()
    return made @ v / (made.sum(-1, keepdim=True) + m.one.exp())


def a_number(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    made = (q @ k.mT * SCALE).exp()
    return made @ v / (made.sum(-1, keepdim=True) + 1)


def after(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    made = (q @ k.mT * SCALE).exp()
    return made / (made.sum(-1, keepdim=True) + m.sink.exp()[:, None, None]) @ v


def as_a_column(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    column = m.sink.view(1, H, 1, 1).expand(B, H, T, 1)
    return torch.cat([q @ k.mT * SCALE, column], -1).softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("attend", [per_head, one_for_all, a_number, after, as_a_column], ids=lambda f: f.__name__)
def test_a_sink_is_recorded_wherever_it_joins(attend: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> None:
    call, model, (q, k, _), output = traced(attend)
    sink = {"one_for_all": model.one.expand(H), "a_number": torch.zeros(H)}.get(attend.__name__, model.sink).detach()
    scores = (q @ k.mT * SCALE).double()
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sink.double().view(H, 1, 1))
    torch.testing.assert_close(call.weights.double(), (scores - total).exp(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(call.scores.double(), scores, rtol=1e-5, atol=1e-5)
    if call.sinks is None:
        assert attend is a_number and call.normalizer == "softmax1"
    else:
        found = call.sinks.view(-1, 1, 1) if call.sinks.dim() == 1 else call.sinks
        torch.testing.assert_close(found.expand(B, H, T, 1), sink.view(H, 1, 1).expand(B, H, T, 1), rtol=0, atol=1e-6)
    assert torch.equal(call.output, output) and call.certificate.faithful


# ------------------------------------------------------------------------------------------------ other extents


@given(st.lists(st.sampled_from([1, 2, 3, 4, 6]), max_size=3), st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_a_dimension_of_another_extent_has_that_extent(extents: list[int], extent: int) -> None:
    """And keeps the axes within it that are whole still."""
    before = tuple(Atom(n) for n in extents)
    (after,) = resized((before,), (extent,), None)
    assert extent_of(after) == extent and sizes((after,)) == (extent,)
    if extent == extent_of(before):
        assert after == before
    inner = before[1:]
    if before and 1 not in extents and extent > extent_of(inner) and extent % extent_of(inner) == 0:
        assert after[1:] == inner and after[0].birth != "lost"


# ------------------------------------------------------------------------------------------------ other products


def test_weights_mixed_to_another_number_of_heads_are_listed() -> None:
    class Fewer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk, self.v, self.mix = nn.Linear(E, 2 * E), nn.Linear(E, 2 * D), nn.Parameter(draw(H, 2, seed=9))

        def forward(self, x: Tensor) -> Tensor:
            q, k = (y.unflatten(-1, (H, D)).transpose(1, 2) for y in self.qk(x).chunk(2, -1))
            v = self.v(x).unflatten(-1, (2, D)).transpose(1, 2)
            weights = torch.einsum("bhts,hg->bgts", (q @ k.mT * SCALE).softmax(-1), self.mix)
            return (weights @ v).transpose(1, 2).flatten(2)

    torch.manual_seed(1)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, Fewer(), draw(B, T, E), warns=True)
    assert not trace.calls and len(trace.skipped) == 1
    assert trace.skipped[0].reason == ("softmax over an axis that the product with the values does not sum over")


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("rank", [1, 2])
def test_projections_by_convolutions(rank: int, batched: bool) -> None:
    """Of a batch and of one sample, along one axis of positions and along two."""

    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = (nn.Conv1d, nn.Conv2d)[rank - 1](E, 3 * E, 1)

        def parts(self, x: Tensor) -> list[Tensor]:
            """… T D."""
            made = self.qkv(x).flatten(-rank)
            return [y.unflatten(-2, (H, D)).mT for y in made.chunk(3, -2)]

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.parts(x)
            return ((q @ k.mT * SCALE).softmax(-1) @ v).mT.flatten(-3, -2)

    torch.manual_seed(1)
    model, x = Convolved(), draw(*([B] if batched else []), E, *[(T,), (2, 3)][rank - 1])
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, x, verify="full")
        q, k, v = (y if batched else y[None] for y in model.parts(x))
    assert len(trace) == 1 and not trace.skipped
    assert dict(trace[0].basis) == dict.fromkeys("BHTSG", "followed")
    check_call(trace[0], q=q, k=k, v=v, scale=SCALE)


@pytest.mark.parametrize("value", [0.0, -2.0, 1.5])
@pytest.mark.parametrize(
    "pad",
    [
        lambda s, x: nn.functional.pad(s, (0, 1), "constant", x),
        lambda s, x: nn.functional.pad(s, (1, 0), value=x),
        lambda s, x: nn.functional.pad(s, pad=(0, 1), mode="constant", value=x),
    ],
    ids=["behind", "in front", "by names"],
)
def test_a_column_of_one_number_is_a_sink(pad: Callable[[Tensor, float], Tensor], value: float) -> None:
    front = pad(torch.zeros(1, 2), 5.0)[0, 0] == 5.0

    def attend(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = pad(q @ k.mT * SCALE, value).softmax(-1)
        return (weights[..., 1:] if front else weights[..., :-1]) @ v

    call, _, (q, k, v), output = traced(attend)
    if value:
        sinks: Tensor | None = torch.full((H,), value)
        assert call.sinks is not None and torch.equal(call.sinks.expand(B, H, T, 1), torch.full((B, H, T, 1), value))
    else:
        sinks = torch.zeros(H)
    scores = (q @ k.mT * SCALE).double()
    assert sinks is not None
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sinks.double().view(H, 1, 1))
    torch.testing.assert_close(call.weights.double(), (scores - total).exp(), rtol=1e-5, atol=1e-6)
    assert torch.equal(call.v, v) and torch.equal(call.output, output) and call.certificate.faithful


def test_a_column_that_repeats_the_last_key_is_no_sink() -> None:
    def attend(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = nn.functional.pad(q @ k.mT * SCALE, (0, 1, 0, 0), "replicate")
        return scores.softmax(-1) @ nn.functional.pad(v.mT, (0, 1, 0, 0), "replicate").mT

    torch.manual_seed(1)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, Host(attend), draw(B, T, E), warns=True)
    assert all(call.sinks is None for call in trace.calls)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("named", [True, False])
def test_the_largest_scores_alone_along_any_axis(dim: int, named: bool) -> None:
    """Their softmax is put where they were picked from, and all others weigh nothing."""

    def attend(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT if dim == -1 else k @ q.mT) * SCALE
        top, at = scores.topk(3, dim)
        weights = torch.zeros_like(scores).scatter(dim, at, top.softmax(dim=dim) if named else top.softmax(dim))
        return (weights if dim == -1 else weights.mT) @ v

    call, _, (q, k, v), output = traced(attend)
    scores = (q @ k.mT * SCALE).double()
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(3, -1).indices, True)
    expected = scores.masked_fill(~keep, -torch.inf).softmax(-1)
    torch.testing.assert_close(call.weights.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(call.mask.expand(B, H, T, T), keep) and torch.equal(call.output, output)
    assert torch.equal(call.q, q) and torch.equal(call.k, k) and torch.equal(call.v, v)


@pytest.mark.parametrize("shared", ["keys", "values", "both"])
def test_keys_and_values_that_are_shared_by_different_numbers_of_heads(shared: str) -> None:
    """The record has as many of the one as of the other, and each query head reads its own."""
    n, groups = 4, 2

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(E, n * D)
            self.k = nn.Linear(E, D * (groups if shared != "values" else n))
            self.v = nn.Linear(E, D * (groups if shared != "keys" else n))

        def parts(self, x: Tensor) -> list[Tensor]:
            return [f(x).unflatten(-1, (-1, D)).transpose(1, 2) for f in (self.q, self.k, self.v)]

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.parts(x)
            k, v = (y if y.shape[1] == n else y.repeat_interleave(n // groups, 1) for y in (k, v))
            return ((q @ k.mT * SCALE).softmax(-1) @ v).transpose(1, 2).flatten(2)

    torch.manual_seed(1)
    model, x = Shared(), draw(3, T, E, std=1.5)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, x, verify="full")
        q, k, v = model.parts(x)
    assert len(trace) == 1 and not trace.skipped
    if shared != "both":
        k, v = (y if y.shape[1] == n else y.repeat_interleave(n // groups, 1) for y in (k, v))
    check_call(trace[0], q=q, k=k, v=v, scale=SCALE)


@pytest.mark.parametrize("how", ["one by one", "unbound", "cut off the width", "a map of each"])
def test_heads_that_are_stacked_are_heads(how: str) -> None:
    """Whatever they were taken from, in their order."""

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.ModuleList(nn.Linear(E, E) for _ in range(3))
            self.each = nn.ModuleList(nn.ModuleList(nn.Linear(E, D) for _ in range(H)) for _ in range(3))

        def parts(self, x: Tensor) -> list[Tensor]:
            if how == "a map of each":
                return [torch.stack([f(x) for f in one], 1) for one in self.each]
            made = [f(x) for f in self.qkv]
            if how == "cut off the width":
                return [torch.stack([y[..., i * D : (i + 1) * D] for i in range(H)], 1) for y in made]
            split = [y.unflatten(-1, (H, D)) for y in made]
            if how == "unbound":
                return [torch.stack(y.unbind(2), 1) for y in split]
            return [torch.stack([y[:, :, i] for i in range(H)], 1) for y in split]

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.parts(x)
            return ((q @ k.mT * SCALE).softmax(-1) @ v).transpose(1, 2).flatten(2)

    torch.manual_seed(1)
    model, x = Stacked(), draw(B, T, E, std=1.5)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, x, verify="full")
        q, k, v = model.parts(x)
    assert len(trace) == 1 and not trace.skipped
    assert dict(trace[0].basis) == dict.fromkeys("BHTSG", "followed")
    check_call(trace[0], q=q, k=k, v=v, scale=SCALE)


PUT_TOGETHER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cat of queries": lambda q, k: torch.cat([q[:, :, i : i + 2] @ k.mT for i in range(0, T, 2)], 2),
    "cat of keys": lambda q, k: torch.cat([q @ k[:, :, i : i + 2].mT for i in range(0, T, 2)], 3),
    "cat of heads": lambda q, k: torch.cat([q[:, i : i + 1] @ k[:, i : i + 1].mT for i in range(H)], 1),
    "hstack": lambda q, k: torch.hstack([q[:, i : i + 1] @ k[:, i : i + 1].mT for i in range(H)]),
    "vstack": lambda q, k: torch.vstack([q[i : i + 1] @ k[i : i + 1].mT for i in range(B)]),
    "stack": lambda q, k: torch.stack([q[:, i] @ k[:, i].mT for i in range(H)], 1),
}
LISTED = {
    "cat of heads": "scores of several products in one softmax: they are not joined along the keys",
    **{
        name: f"softmax over scores of q·k that went through '{name}' before it, which is not followed"
        for name in ("hstack", "vstack", "stack")
    },
}


@pytest.mark.parametrize("how", PUT_TOGETHER)
def test_scores_that_are_put_together_before_the_softmax_are_read_or_listed(how: str) -> None:
    def attend(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (PUT_TOGETHER[how](q, k) * SCALE).softmax(-1) @ v

    if how not in LISTED:
        call, _, (q, k, v), output = traced(attend)
        check_call(call, q=q, k=k, v=v, scale=SCALE, output=output)
        return
    torch.manual_seed(1)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, Host(attend), draw(B, T, E), warns=True)
    assert not trace.calls and [item.reason for item in trace.skipped] == [LISTED[how]]
