"""Attention of any score and any normalizer: weights, values and output are recorded, and q and k where they score."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn.errors import FieldAbsent
from tests.reference import assert_close, draw, trace_checked
from tests.zoo.other_weights import NORMALIZER, OTHER_WEIGHTS, SAID, SCORE, B, D, E, H, T


def traced(model: nn.Module, x: torch.Tensor, **options: Any) -> Any:
    import hookattn

    with torch.no_grad():
        return trace_checked(hookattn.trace, model.eval(), x, verify="full", **options)


@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_recorded_with_all_there_is(name: str) -> None:
    torch.manual_seed(3)
    model = OTHER_WEIGHTS[name]().double()
    trace = traced(model, draw(B, T, E, std=1.5, dtype=torch.float64))
    said = {field: x() if callable(x) else x for field, x in SAID.items()}
    assert [item.reason for item in trace.skipped] == []
    assert len(trace) == 1
    call = trace[0]
    assert call.certificate.status == "faithful"
    assert (call.score, call.normalizer) == (SCORE[name], NORMALIZER[name])
    for field in ("weights", "v", "output"):
        assert_close(getattr(call, field), said[field].expand_as(getattr(call, field)), 1e-9, field)
        assert getattr(call, field).shape == said[field].shape, field
    if call.score == "dot":
        assert_close(call.q, said["q"], 1e-9, "q")
        assert_close(call.k, said["k"], 1e-9, "k")
    else:
        for field in ("q", "k"):
            with pytest.raises(FieldAbsent):
                getattr(call, field)
        assert call.scores is not None
    if "scores" in said:
        assert_close(call.scores, said["scores"], 1e-9, "scores")
    mask = said.get("mask")
    if mask is not None:
        assert torch.equal(call.mask.expand_as(call.weights), mask.expand_as(call.weights))


class Differential(nn.Module):
    """The difference of two softmaxes: of one over twice the heads, or of two, or of the halves of one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(E, 2 * E), nn.Linear(E, 2 * E), nn.Linear(E, 2 * E)
        self.how = how

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k = (y.unflatten(-1, (4, D)).transpose(1, 2) for y in (self.q(x), self.k(x)))
        return q, k, self.v(x).unflatten(-1, (2, 2 * D)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.parts(x)
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        if self.how == "apart":
            a, b = ((q[:, i::2] @ k[:, i::2].mT * 0.3).masked_fill(hidden, -torch.inf).softmax(-1) for i in (0, 1))
        else:
            w = (q @ k.mT * 0.3).masked_fill(hidden, -torch.inf).softmax(-1)
            if self.how == "view":
                w = w.view(B, 2, 2, T, T)
                a, b = w[:, :, 0], w[:, :, 1]
            elif self.how == "unbind":
                a, b = w.unflatten(1, (2, 2)).unbind(2)
            elif self.how == "strided":
                a, b = w[:, 0::2], w[:, 1::2]
            else:
                a, b = w.chunk(2, 1)
        return ((a - 0.4 * b) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("how", ["apart", "view", "unbind", "strided", "chunk"])
def test_both_maps_of_a_difference(how: str) -> None:
    torch.manual_seed(4)
    model, x = Differential(how).double(), draw(B, T, E, std=1.5, dtype=torch.float64)
    trace = traced(model, x)
    assert not trace.skipped
    assert len(trace) == 2
    with torch.no_grad():
        q, k, v = model.parts(x)
    scores = q @ k.mT * 0.3
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    halves = [weights[:, :2], weights[:, 2:]] if how == "chunk" else [weights[:, 0::2], weights[:, 1::2]]
    heads_of = [[0, 1], [2, 3]] if how == "chunk" else [[0, 2], [1, 3]]
    for call, own, heads in zip(trace, halves, heads_of, strict=True):
        assert call.certificate.status == "faithful"
        assert_close(call.weights, own, 1e-9, "weights")
        assert_close(call.applied, halves[0] - 0.4 * halves[1], 1e-9, "applied")
        assert_close(call.output, (halves[0] - 0.4 * halves[1]) @ v, 1e-9, "output")
        assert torch.equal(call.q, q[:, heads])
        assert torch.equal(call.k, k[:, heads])
        assert torch.equal(call.v, v)
        assert torch.equal(call.mask.expand_as(call.weights), mask.expand_as(call.weights))
        assert any("difference" in note for note in call.notes)


# ------------------------------------------------------------------------------------------------ what is no attention


def without(name: str) -> Any:
    """Whatever is done to features or with what is learned is no attention, and is not told of."""

    def add(made: Any) -> Any:
        NOTHING[name] = made
        return made

    return add


NOTHING: dict[str, Any] = {}


@without("feed-forward of parameters")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ m.a) @ m.b


@without("class probabilities times embeddings")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    return (x @ m.a).softmax(-1) @ m.b


@without("router")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    w, i = m.map(x)[..., :4].topk(2, -1)
    experts = torch.stack([m.map(x) * j for j in range(4)], -2)
    return (w.softmax(-1)[..., None] * experts.gather(-2, i[..., None].expand(*i.shape, E))).sum(-2)


@without("router by einsum")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    experts = torch.stack([m.map(x) * j for j in range(4)], 1)
    return torch.einsum("bte,betd->btd", m.map(x)[..., :4].softmax(-1), experts)


@without("Gram matrix in a loss")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    gram = x.mT @ x / T
    return (gram - gram.mT).square().mean()


@without("whitening")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.map(x)
    return y @ torch.linalg.inv(y.mT @ y / T + torch.eye(E, dtype=x.dtype))


@without("iterated orthogonalization")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.map(x)
    for _ in range(3):
        y = 1.5 * y - 0.5 * (y @ y.mT) @ y
    return y


@without("products of rotations")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = m.map(x)[..., :9].view(-1, T, 3, 3), m.map(2 * x)[..., :9].view(-1, T, 3, 3)
    return (a @ b @ m.map(x)[..., 9:12, None]).squeeze(-1)


@without("maps made by another network")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    w = m.map(x.mean(1)).view(-1, 4, 4)
    return torch.relu(x[..., :4] @ w) @ w.mT


@without("learned mixture of layers")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    return (m.a[0, :3].softmax(-1)[:, None, None, None] * torch.stack([x, m.map(x), 2 * x])).sum(0)


@without("features weighed by a softmax over them")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    return (m.map(x).softmax(-1) * x).sum(-1)


@without("weights summed up again behind a mask")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    w = m.map(x).softmax(1)
    return w / (w * (x > 0).to(x.dtype)).sum(1, keepdim=True).clamp(min=1e-6)


@without("expected index")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    return (m.map(x).softmax(-1) * torch.arange(float(E))).sum(-1)


@without("streams mixed at each position")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Hyper-connections: a layer's result is added to several residual streams, and read from them again."""
    streams = x[:, :, None].repeat(1, 1, 3, 1)
    for _ in range(2):
        mixing = m.map(streams.mean(2))[..., :6].sigmoid()
        new = (mixing[..., :3, None] * streams).sum(2)
        streams = mixing[..., 3:, None] * m.map(new)[..., None, :] + streams
    return (m.map(x)[..., :3, None].sigmoid() * streams).sum(2)


@without("streams mixed at each position, by products")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    streams = x[:, :, None].repeat(1, 1, 3, 1)
    for _ in range(2):
        mixing = m.map(streams.mean(2))[..., :6].sigmoid()
        new = (mixing[..., None, :3] @ streams).squeeze(2)
        streams = mixing[..., 3:, None] @ m.map(new)[..., None, :] + streams
    return (m.map(x)[..., None, :3].sigmoid() @ streams).squeeze(2)


WITHOUT_WEIGHTS: dict[str, tuple[Any, str]] = {}


def weightless(name: str, reason: str) -> Any:
    def add(made: Any) -> Any:
        WITHOUT_WEIGHTS[name] = made, reason
        return made

    return add


@weightless("linear attention", "linear attention")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.heads(x)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(-2)[..., None])


@weightless("linear attention, normalized before", "linear attention")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.heads(x)
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@weightless("causal linear attention", "state space")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.heads(x)
    kv = torch.einsum("bhsd,bhse->bhsde", k, v).cumsum(2)
    return torch.einsum("bhtd,bhtde->bhte", q, kv)


@weightless("recurrence", "state space")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.heads(x)
    state, out = torch.zeros(B, H, D, D, dtype=x.dtype), []
    for t in range(T):
        state = state * 0.9 + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


@weightless("recurrence by products", "state space")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.heads(x)
    state, out = torch.zeros(B, H, D, D, dtype=x.dtype), []
    for t in range(T):
        state = state * 0.9 + k[:, :, t, :, None] @ v[:, :, t, None]
        out.append(q[:, :, t, None] @ state)
    return torch.cat(out, 2)


def delta_rule(m: Any, x: torch.Tensor, chunk: int, solved: bool) -> torch.Tensor:
    """The gated delta rule as fast kernels compute it: within chunks of positions by an inverse, a state between."""
    q, k, v = (F.pad(y, (0, 0, 0, -T % chunk)).unflatten(2, (-1, chunk)) for y in m.heads(x))
    step = F.pad(m.map(x)[..., :H].sigmoid().mT, (0, -T % chunk)).unflatten(2, (-1, chunk))[..., None]
    decay = F.pad(F.logsigmoid(m.map(x)[..., H : 2 * H]).mT, (0, -T % chunk)).unflatten(2, (-1, chunk)).cumsum(-1)
    later = torch.ones(chunk, chunk, dtype=torch.bool).triu(1)
    pairs = (decay[..., None] - decay[..., None, :]).masked_fill(later, -torch.inf).exp()
    corrected, given = v * step, k * step * decay[..., None].exp()
    if solved:
        system = ((k * step) @ k.mT) * pairs
        corrected, read = (
            torch.linalg.solve_triangular(system, y, upper=False, unitriangular=True) for y in (corrected, given)
        )
    else:
        inverse = -(((k * step) @ k.mT) * pairs).masked_fill(later | torch.eye(chunk, dtype=torch.bool), 0)
        for i in range(1, chunk):
            row, above = inverse[..., i, :i].clone(), inverse[..., :i, :i].clone()
            inverse[..., i, :i] = row + (row[..., None] * above).sum(-2)
        inverse = inverse + torch.eye(chunk, dtype=x.dtype)
        corrected, read = inverse @ corrected, inverse @ given
    state, out = torch.zeros(B, H, D, D, dtype=x.dtype), torch.zeros_like(corrected)
    within = (q @ k.mT) * pairs
    for i in range(q.shape[2]):
        new = corrected[:, :, i] - read[:, :, i] @ state
        out[:, :, i] = (q[:, :, i] * decay[:, :, i, :, None].exp()) @ state + within[:, :, i] @ new
        left = (decay[:, :, i, -1:] - decay[:, :, i]).exp()[..., None]
        state = state * decay[:, :, i, -1, None, None].exp() + (k[:, :, i] * left).mT @ new
    return out.flatten(2, 3)[:, :, :T]


for _chunk in (8, 2):
    for _solved in (True, False):
        weightless(f"delta rule in chunks of {_chunk}, {'solved' if _solved else 'by rows'}", "state space")(
            lambda m, x, chunk=_chunk, solved=_solved: delta_rule(m, x, chunk, solved)
        )


@weightless("selective state space", "state space")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    step, b, c = F.softplus(m.map(x)), m.map(x)[..., :4], m.map(x)[..., 4:8]
    decay = torch.exp(-step[..., None] * torch.arange(1.0, 5.0, dtype=x.dtype))
    given = step[..., None] * b[:, :, None] * x[..., None]
    state, out = torch.zeros(B, E, 4, dtype=x.dtype), []
    for t in range(T):
        state = decay[:, t] * state + given[:, t]
        out.append((state * c[:, t, None]).sum(-1))
    return torch.stack(out, 1)


@weightless("positions pooled by a gate of each feature", "for each feature")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    windows = F.pad(x, (0, 0, 0, 1)).unflatten(1, (-1, 3))
    return (m.map(windows).softmax(2) * windows).sum(2)


@weightless("convolution made of the data", "convolution")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    w = m.map(x)[..., :3].softmax(-1)
    return (F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1) * w[:, :, None]).sum(-1)


@weightless("convolution made of the data, of columns", "convolution")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    w = m.map(x)[..., : 3 * H].reshape(-1, 3, 1).softmax(1)
    windows = F.unfold(x.mT[..., None], [3, 1], padding=[1, 0]).mT.reshape(-1, D, 3)
    return (windows @ w).reshape(B, T, E)


@weightless("values, weights and a projection in one", "one einsum")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.heads(x)
    return torch.einsum("bhts,bhsd,hde->bte", (q @ k.mT).softmax(-1), v, m.a.view(H, D, E))


@weightless("the values of the largest scores gathered", "largest scores")
def _(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.heads(x)
    top, i = (q @ k.mT).topk(3, -1)
    values = v[:, :, None].expand(-1, -1, T, -1, -1).gather(3, i[..., None].expand(-1, -1, -1, -1, D))
    return (top.softmax(-1)[..., None] * values).sum(3)


class Beside(nn.Module):
    """A layer that attends, and another thing."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.map, self.qkv, self.other = nn.Linear(E, E), nn.Linear(E, 3 * E), other
        self.a, self.b = nn.Parameter(torch.randn(E, E)), nn.Parameter(torch.randn(E, E))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(y.unflatten(-1, (H, D)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        F.scaled_dot_product_attention(x, x, x)
        return self.other(self, x)


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("name", NOTHING)
def test_what_is_no_attention_is_not_told_of(name: str, batch: int) -> None:
    torch.manual_seed(5)
    trace = traced(Beside(NOTHING[name]).double(), draw(batch, T, E, dtype=torch.float64), warns=True)
    assert [call.tap for call in trace] == ["sdpa"]
    assert not trace.skipped


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_what_forms_no_weights_is_told_of(name: str) -> None:
    torch.manual_seed(6)
    made, reason = WITHOUT_WEIGHTS[name]
    trace = traced(Beside(made).double(), draw(B, T, E, dtype=torch.float64), warns=True)
    assert [call.tap for call in trace] == ["sdpa"]
    assert len(trace.skipped) == 1
    assert reason in trace.skipped[0].reason


@pytest.mark.parametrize("iterations", [0, 3])
def test_an_iterated_inverse_of_weights_is_no_attention(iterations: int) -> None:
    """Nystrom: three softmaxes, one of which meets values; the products of the inverse are none of ours."""

    def nystrom(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = m.heads(x)
        few_q, few_k = q[:, :, :3], k[:, :, :3]
        a, b, c = (q @ few_k.mT).softmax(-1), (few_q @ few_k.mT).softmax(-1), (few_q @ k.mT).softmax(-1)
        z, one = b.mT / (b.abs().sum(-1).max() * b.abs().sum(-2).max()), torch.eye(3, dtype=x.dtype)
        for _ in range(iterations):
            bz = b @ z
            z = 0.25 * z @ (13 * one - bz @ (15 * one - bz @ (7 * one - bz)))
        return (a @ z) @ (c @ v)

    torch.manual_seed(7)
    trace = traced(Beside(nystrom).double(), draw(B, T, E, dtype=torch.float64), warns=True)
    assert [tuple(call.weights.shape[-2:]) for call in trace] == [(T, T), (3, T)]
    assert len(trace.skipped) == 1
    assert "other weights" in trace.skipped[0].reason


def test_one_softmax_twice_is_one() -> None:
    """Weights of 0 and 1 that gradients pass through: ``hard - soft.detach() + soft``."""

    def hard(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = m.heads(x)
        soft = (q @ k.mT).softmax(-2)
        one = torch.zeros_like(soft).scatter_(-2, soft.max(-2, keepdim=True)[1], 1.0)
        w = one - soft.detach() + soft
        return (w / (w.sum(-1, keepdim=True) + 1.0)) @ v

    torch.manual_seed(8)
    trace = traced(Beside(hard).double(), draw(B, T, E, dtype=torch.float64))
    assert [call.normalizer for call in trace] == ["softmax", "softmax over queries"]
    assert not trace.skipped


@pytest.mark.parametrize("size", [1.0, 400.0])
def test_a_penalty_that_scores_outweigh_hides_nothing(size: float) -> None:
    """0 and -100 are a mask where they leave nothing of a weight, and a bias where scores are larger than they are."""
    shift = torch.zeros(T, T, dtype=torch.float64)
    shift[:2, 2:] = shift[2:, :2] = -100.0

    def windows(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = m.heads(x)
        return (q @ k.mT * size + shift).softmax(-1) @ v

    torch.manual_seed(9)
    model, x = Beside(windows).double(), draw(B, T, E, dtype=torch.float64)
    _, call = traced(model, x)
    with torch.no_grad():
        q, k, _ = model.heads(x)
    assert call.certificate.status == "faithful"
    assert_close(call.weights, (q @ k.mT * size + shift).softmax(-1), 1e-9, "weights")
    if size == 1:
        assert call.bias is None
        assert torch.equal(call.mask.expand_as(call.weights), (shift == 0).expand_as(call.weights))
    else:
        assert torch.equal(call.bias.expand_as(call.weights), shift.expand_as(call.weights))
        assert bool(call.mask.all())


class MaskedDistances(nn.Module):
    """The square of a distance, negative, filled where masked: scores, and weights by a sigmoid of them."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.p, self.fill = nn.Linear(12, 3 * 12), fill

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.p(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        s = -torch.cdist(q, k).pow(2)
        keep = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
        return s.masked_fill(~keep, self.fill).sigmoid() @ v


@pytest.mark.parametrize("fill", [-math.inf, -1e9])
def test_a_mask_of_squared_distances(fill: float) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        call = hookattn.trace(MaskedDistances(fill), torch.randn(2, 5, 12))[0]
    assert call.score == "distance" and call.normalizer == "sigmoid"
    assert torch.equal(call.mask.expand(2, 3, 5, 5), torch.ones(2, 3, 5, 5, dtype=torch.bool).tril())
