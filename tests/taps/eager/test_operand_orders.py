"""The same attention with its axes in other orders and its operands in other places: one record, whatever was written.

What is done between the scores and the values is one of several ways; around it, the letters of q, k, v, of the scores
and of the output are permuted, and each product is written with either operand first. No two extents are alike, so
that an axis in the wrong place has the wrong size, and every value is compared.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, einsum, nn

import hookattn
from tests.reference import check_call, draw, trace_checked

B, H, T, D, E = 2, 3, 6, 5, 15
SCALE = 0.4
GATHERED = [4, 1, 3]
WAYS = ("plain", "cut", "gathered", "masked", "split", "exponentials", "mixed", "dropped", "last", "flipped")
KEYS = {"cut": [1, 2, 3, 4], "gathered": sorted(GATHERED)}


class Written(nn.Module):
    """An attention in one of the ways, with an order of axes and operands that a seed draws."""

    def __init__(self, way: str, seed: int) -> None:
        super().__init__()
        self.way, chance = way, random.Random(f"{way} {seed}")
        self.qkv = nn.Linear(E, 3 * E)
        self.mix = nn.Parameter(torch.empty(H, H))

        def order(letters: str) -> str:
            return "".join(chance.sample(letters, len(letters)))

        self.q, self.k, self.v = order("bhtd"), order("bhsd"), order("bhsd")
        self.scores, self.out = order("bhts"), order("bhtd")
        self.weights_first, self.keys_first, self.mix_first = (chance.random() < 0.5 for _ in range(3))

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v as B H T D."""
        q, k, v = (y.unflatten(-1, (H, D)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return q, k, v

    def product(self, left: str, a: Tensor, right: str, b: Tensor, out: str, swapped: bool) -> Tensor:
        if swapped:
            left, a, right, b = right, b, left, a
        return einsum(f"{left},{right}->{out}", a, b)

    def values(self, weights: Tensor, v: Tensor, letters: str | None = None) -> Tensor:
        """In the order that was drawn; the keys that the weights are of and those of v are the same."""
        return self.product(letters or self.scores, weights, self.v, v, self.out, not self.weights_first)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        q = q.permute(["bhtd".index(y) for y in self.q])
        k, v = (y.permute(["bhsd".index(z) for z in to]) for y, to in ((k, self.k), (v, self.v)))
        if self.way == "last":
            q = q.narrow(self.q.index("t"), T - 2, 2)
        scores = self.product(self.q, q, self.k, k, self.scores, self.keys_first) * SCALE
        out = getattr(self, self.way)(scores, v, self.scores.index("s"), self.v.index("s"))
        return out.permute([self.out.index(y) for y in "bthd"]).flatten(2)

    def plain(self, scores: Tensor, v: Tensor, at: int, key: int) -> Tensor:
        return self.values(scores.softmax(at), v)

    last = plain

    def cut(self, scores: Tensor, v: Tensor, at: int, key: int) -> Tensor:
        return self.values(scores.narrow(at, 1, 4).softmax(at), v.narrow(key, 1, 4))

    def gathered(self, scores: Tensor, v: Tensor, at: int, key: int) -> Tensor:
        index = torch.tensor(GATHERED)
        return self.values(scores.index_select(at, index).softmax(at), v.index_select(key, index))

    def flipped(self, scores: Tensor, v: Tensor, at: int, key: int) -> Tensor:
        return self.values(scores.flip(at).softmax(at), v.flip(key))

    def masked(self, scores: Tensor, v: Tensor, at: int, key: int) -> Tensor:
        row = torch.arange(T).view([T if y == "t" else 1 for y in self.scores])
        column = torch.arange(T).view([T if y == "s" else 1 for y in self.scores])
        return self.values(scores.masked_fill(column > row, -torch.inf).softmax(at), v)

    def split(self, scores: Tensor, v: Tensor, at: int, key: int) -> Tensor:
        one, two = scores.softmax(at).split([2, T - 2], at)
        return self.values(one, v.narrow(key, 0, 2)) + self.values(two, v.narrow(key, 2, T - 2))

    def exponentials(self, scores: Tensor, v: Tensor, at: int, key: int) -> Tensor:
        made = (scores - scores.amax(at, keepdim=True)).exp()
        total = made.sum(at)
        letters = self.scores.replace("s", "")
        total = total.permute([letters.index(y) for y in self.out if y != "d"]).unsqueeze(self.out.index("d"))
        return self.values(made, v) / total

    def mixed(self, scores: Tensor, v: Tensor, at: int, key: int) -> Tensor:
        """Heads are mixed after the softmax."""
        met = self.scores.replace("h", "g")
        applied = self.product(met, scores.softmax(at), "gh", self.mix, self.scores, self.mix_first)
        return self.values(applied, v)

    def dropped(self, scores: Tensor, v: Tensor, at: int, key: int) -> Tensor:
        return self.values(F.dropout(scores.softmax(at), 0.3, self.training), v)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("way", WAYS)
def test_one_record_in_whatever_order(way: str, seed: int) -> None:
    torch.manual_seed(1)
    model = Written(way, seed).train(way == "dropped")
    x = draw(B, T, E, std=1.5)
    with torch.no_grad():
        model.mix.copy_(draw(H, H, seed=3))
        trace = trace_checked(hookattn.trace, model, x, verify="full")
        q, k, v = model.parts(x)
    said = f"q {model.q}, k {model.k}, v {model.v}, scores {model.scores}, out {model.out}"
    assert not trace.skipped and len(trace) == 1, (said, [item.reason for item in trace.skipped])
    call = trace[0]
    if way == "last":
        q = q[:, :, -2:]
    kept = KEYS.get(way, list(range(T)))
    k, v = k[:, :, kept], v[:, :, kept]
    if way == "flipped" and torch.equal(call.k, k.flip(2)):
        k, v = k.flip(2), v.flip(2)
    mask = torch.ones(T, T, dtype=torch.bool).tril() if way == "masked" else None
    own = trace.output.unflatten(-1, (H, D)).transpose(1, 2)
    assert torch.equal(call.output, own), said
    assert dict(call.basis) == dict.fromkeys("BHTSG", "followed"), said
    if way == "mixed":
        weights = (q @ k.mT * SCALE).softmax(-1)
        torch.testing.assert_close(call.weights, weights, rtol=0, atol=1e-6)
        applied = torch.einsum("bgts,gh->bhts", weights, model.mix)
        torch.testing.assert_close(call.applied, applied, rtol=1e-5, atol=1e-6)
        assert torch.equal(call.q, q) and torch.equal(call.k, k) and torch.equal(call.v, v) and call.mixed
        return
    more: dict[str, Any] = {"dropout": 0.3} if way == "dropped" else {}
    check_call(call, q=q, k=k, v=v, scale=SCALE, mask=mask, **more)
    if way == "dropped":
        torch.testing.assert_close(call.applied @ v, own, rtol=1e-5, atol=1e-6)
