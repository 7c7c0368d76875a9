"""Edits of attention in other layouts, piece by piece, or written out by hand: by the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hookattn
from hookattn import EditError, edit
from tests.edit.by_hand import CASES, Case, attend
from tests.reference import draw, same_bits
from tests.taps.test_changes import Projected

X = draw(2, 6, 16, seed=4, dtype=torch.float64)


class Base(Projected):
    """H=4 heads of width 8 on G key heads."""

    groups = 4

    def __init__(self) -> None:
        super().__init__(self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.attention(*self.operands(x)))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class Folded(Base):
    """Heads in the batch."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).view(-1, 4, 6, 8)


class HeadsFirst(Base):
    """Heads before the batch."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(0, 1)


class FiveAxes(Base):
    """One axis more."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t[:, None] for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)[:, 0]


class Packed(Base):
    """The query heads of a key head in the rows of one query."""

    groups = 2

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.unflatten(1, (2, 2)).flatten(2, 3)
        return F.scaled_dot_product_attention(q, k, v).unflatten(2, (2, 6)).flatten(1, 2)


class Chunks(Base):
    """Two queries at a time."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(2, 2)], 2)


class HeadPairs(Base):
    """Two heads at a time."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(q.split(2, 1), k.split(2, 1), v.split(2, 1), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 1)


class ByHand(Base):
    """In plain operations."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v


class ByHandFolded(Base):
    """In plain operations, with grouped heads and heads in the batch."""

    groups = 2

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(2, 1).flatten(0, 1) for t in (k, v))
        scores = torch.bmm(q.flatten(0, 1) * 8**-0.5, k.transpose(1, 2))
        return torch.bmm(torch.softmax(scores, -1), v).view(-1, 4, 6, 8)


class ByHandEinsum(Base):
    """In plain operations, heads after the positions."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        raised = torch.einsum("bthd,bshd->bhts", q, k).mul(8**-0.5).exp()
        weights = raised / raised.sum(-1, keepdim=True)
        return torch.einsum("bhts,bshd->bthd", weights, v).transpose(1, 2)


LAYOUTS = [Folded, HeadsFirst, FiveAxes, Packed, Chunks, HeadPairs, ByHand, ByHandFolded, ByHandEinsum]
ONLY_TOGETHER = {"mean": Chunks}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_by_the_same_numbers(layout: type[Base], case: Case) -> None:
    torch.manual_seed(1)
    model = layout().double()
    if ONLY_TOGETHER.get(case.name) is layout:
        with pytest.raises(EditError, match="2 of 6 queries at a time"):
            hookattn.edited(model, X, case.edit())
        return
    made: list[Tensor] = []
    with torch.no_grad():
        plain = model(X)
        trace = hookattn.edited(model, X, case.edit(), verify="full", strict=True)
        z = attend(*model.operands(X), changes=case.changes, weights_made=made)
        assert float((trace.output - model.finish(z)).abs().max()) < 1e-12
        assert float((plain - trace.output).abs().max()) > 1e-4
    (call,) = trace.calls
    assert float((call.weights - made[0]).abs().max()) < 1e-12 and float((call.output - z).abs().max()) < 1e-12
    assert [one.edit for one in call.edits] == [case.edit().name]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_others_keep_their_bits(layout: type[Base]) -> None:
    torch.manual_seed(1)
    model, x = layout(), X.float()
    with torch.no_grad():
        clean, made = hookattn.trace(model, x)[0], hookattn.edited(model, x, edit.zero("weights", heads=1))[0]
    assert same_bits(clean.output[:, [0, 2, 3]], made.output[:, [0, 2, 3]]) and bool((made.output[:, 1] == 0).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout: type[Base]) -> None:
    torch.manual_seed(1)
    model = layout().double()
    case = next(c for c in CASES if c.name == "turn weights")
    got = torch.autograd.grad(hookattn.edited(model, X, case.edit()).output.square().sum(), list(model.parameters()))
    z = attend(*model.operands(X), changes=case.changes)
    expected = torch.autograd.grad(model.finish(z).square().sum(), list(model.parameters()))
    assert all(float((a - b).abs().max()) < 1e-10 for a, b in zip(got, expected, strict=True))
