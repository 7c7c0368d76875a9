"""One softmax over the keys of several products, split again before the values: against explicit math in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import check_call, draw, heads, merge, paths, trace_checked
from tests.zoo.base import B, D, E, H, S, T
from tests.zoo.special import JointSelfCrossAttention


class TwoSources(nn.Module):
    """The sequence's own keys and those of another, joined in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.kv, self.other, self.proj = (nn.Linear(E, n) for n in (E, 2 * E, 2 * E, E))

    def parts(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        q = heads(self.q(x), H)
        k1, v1 = (heads(t, H) for t in self.kv(x).chunk(2, -1))
        k2, v2 = (heads(t, H) for t in self.other(y).chunk(2, -1))
        return q, k1, v1, k2, v2

    def mask(self) -> Tensor:
        return torch.cat([torch.ones(T, T).tril(), torch.ones(T, S)], -1).bool()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.proj(merge(getattr(self, self.how)(*self.parts(x, y))))

    def split(self, q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
        scores = torch.cat([q @ k1.mT, q @ k2.mT], -1) / math.sqrt(D)
        one, two = scores.masked_fill(~self.mask(), -torch.inf).softmax(-1).split([T, S], -1)
        return one @ v1 + two @ v2

    def sliced(self, q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
        one, two = q @ k1.transpose(-1, -2) * D**-0.5, q @ k2.transpose(-1, -2) * D**-0.5
        one += torch.zeros(T, T, dtype=q.dtype).masked_fill(~self.mask()[:, :T], torch.finfo(q.dtype).min)
        weights = F.softmax(torch.cat((one, two), dim=3), dim=-1)
        out = weights[..., T:] @ v2
        out += torch.matmul(weights[:, :, :, :T], v1)
        return out

    def narrowed(self, q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
        """The keys are joined before the product, the weights are cut after it."""
        weights = (q @ torch.cat([k1, k2], 2).mT / math.sqrt(D)).masked_fill(~self.mask(), -torch.inf).softmax(-1)
        one, two = weights.narrow(-1, 0, T), weights.narrow(3, T, S)
        return torch.einsum("bhts,bhsd->bhtd", one, v1).add(torch.einsum("bhts,bhsd->bhtd", two, v2))

    def folded(self, q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
        q, k1, v1, k2, v2 = (x.reshape(B * H, -1, D) for x in (q, k1, v1, k2, v2))
        scores = torch.cat([torch.bmm(q, k1.mT), torch.bmm(q, k2.mT)], -1).div(math.sqrt(D))
        weights = scores.view(B, H, T, T + S).masked_fill(~self.mask(), -torch.inf).view(B * H, T, T + S).softmax(-1)
        out = torch.bmm(weights[:, :, :T], v1) + torch.bmm(weights[:, :, T:], v2)
        return out.view(B, H, T, D)

    def biased(self, q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
        """A bias on one of them, and a shift that the other has alone is a bias too."""
        one, two = q @ k1.mT / math.sqrt(D) + self.bias(), q @ k2.mT / math.sqrt(D) - 0.5
        weights = torch.cat([one.masked_fill(~self.mask()[:, :T], -torch.inf), two], -1).softmax(-1)
        return weights[..., :T] @ v1 + weights[..., T:] @ v2

    def bias(self) -> Tensor:
        return draw(1, H, T, T, seed=9, dtype=self.q.weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["split", "sliced", "narrowed", "folded", "biased"])
def test_two_sources(how: str, dtype: torch.dtype) -> None:
    import hookattn

    torch.manual_seed(1)
    model = TwoSources(how).to(dtype).eval()
    x, y = draw(B, T, E, seed=1, std=1.5, dtype=dtype), draw(B, S, E, seed=2, std=1.5, dtype=dtype)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, (x, y), verify="full")
        q, k1, v1, k2, v2 = model.parts(x, y)
        output = getattr(model, how)(q, k1, v1, k2, v2)
    assert not trace.skipped, [(item.path, item.reason) for item in trace.skipped]
    assert paths(trace.calls) == [""]
    bias = None
    if how == "biased":
        bias = torch.cat([model.bias(), torch.full((1, H, T, S), -0.5, dtype=dtype)], -1)
    wanted = {"q": q, "k": torch.cat([k1, k2], 2), "v": torch.cat([v1, v2], 2), "scale": D**-0.5, "bias": bias}
    check_call(trace[0], **wanted, mask=model.mask(), output=output)


def test_the_joint_attention_of_the_zoo_is_one_call() -> None:
    import hookattn

    model = JointSelfCrossAttention().eval()
    x, y = draw(B, T, E, seed=1), draw(B, S, E, seed=2)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, (x, y))
        q, k1, v1, k2, v2 = model.parts(x, y)
    assert len(trace) == 1 and not trace.skipped
    check_call(trace[0], q=q, k=torch.cat([k1, k2], 2), v=torch.cat([v1, v2], 2), scale=1.0)


N, X, G = 3, 4, 2  # blocks, their length, global tokens


class GlobalAndLocal(nn.Module):
    """Blocks that attend to themselves and to global tokens: the blocks are a batch, the global keys are in each."""

    def __init__(self, dropout: float = 0.0, mix: bool = False) -> None:
        super().__init__()
        self.qkv, self.to_global, self.dropout, self.mix = nn.Linear(E, 3 * E), nn.Linear(E, 2 * E), dropout, mix

    def parts(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (heads(t, H).view(B, H, N, X, D) for t in self.qkv(x).chunk(3, -1))
        kg, vg = (heads(t, H) for t in self.to_global(g).chunk(2, -1))
        return q * D**-0.5, k, v, kg, vg

    def mask(self) -> Tensor:
        """B N G+X, additive."""
        hidden = torch.zeros(B, N * X, dtype=self.qkv.weight.dtype)
        hidden[1, -3:] = torch.finfo(hidden.dtype).min
        return F.pad(hidden.view(B, N, X), (G, 0))

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        q, k, v, kg, vg = self.parts(x, g)
        scores = torch.cat([torch.einsum("BHNKF,BHGF->BHNKG", q, kg), torch.einsum("BHNKF,BHNXF->BHNKX", q, k)], -1)
        weights = F.softmax(scores + self.mask()[:, None, :, None, :], dim=-1)
        weights = F.dropout(weights, self.dropout, self.training)
        far = torch.einsum("BHNKG,BHGF->BHNKF", weights[:, :, :, :, :G], vg)
        near = torch.einsum("BHNKX,BHNXF->BHNKF", weights[:, :, :, :, G:], v)
        return (far + near).permute(0, 2, 3, 1, 4).reshape(B, N * X, E)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_blocks_with_global_keys(dropout: float) -> None:
    import hookattn

    torch.manual_seed(2)
    model = GlobalAndLocal(dropout).double().train(dropout > 0)
    x = draw(B, N * X, E, seed=3, std=1.5, dtype=torch.float64)
    g = draw(B, G, E, seed=4, std=1.5, dtype=torch.float64)
    with torch.no_grad():
        trace = hookattn.trace(model, (x, g), verify="full")
        q, k, v, kg, vg = model.parts(x, g)
    assert not trace.skipped and len(trace) == 1

    def blocks(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    k, v = (
        torch.cat([blocks(far[:, :, None].expand(-1, -1, N, -1, -1)), blocks(near)], 2)
        for far, near in ((kg, k), (vg, v))
    )
    mask = (model.mask() == 0).view(B * N, 1, 1, G + X)
    check_call(trace[0], q=blocks(q), k=k, v=v, scale=1.0, mask=mask, dropout=dropout)


class Bands(nn.Module):
    """Middle blocks: the first block's keys, a band's, and the last block's, in products of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (heads(t, H).view(B, H, 6, 2, D) for t in self.qkv(x).chunk(3, -1))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        middle = q[:, :, 2:-2]
        keys = torch.cat([k[:, :, 1:-3], k[:, :, 2:-2], k[:, :, 3:-1]], dim=3)
        values = torch.cat([v[:, :, 1:-3], v[:, :, 2:-2], v[:, :, 3:-1]], dim=3)
        inner = torch.matmul(middle, keys.transpose(-1, -2)) * 0.5
        first = torch.einsum("bhlqd,bhkd->bhlqk", middle, k[:, :, 0]) * 0.5
        last = torch.einsum("bhlqd,bhkd->bhlqk", middle, k[:, :, -1]) * 0.5
        inner += (1.0 - self.mask()) * -10000.0
        first += (1.0 - torch.ones(B, 1, 1, 1, 2)) * -10000.0
        weights = F.softmax(torch.cat([first, inner, last], dim=-1), dim=-1)
        out = torch.matmul(weights[:, :, :, :, 2:8], values)
        out += torch.einsum("bhlqk,bhkd->bhlqd", weights[:, :, :, :, :2], v[:, :, 0])
        out += torch.einsum("bhlqk,bhkd->bhlqd", weights[:, :, :, :, -2:], v[:, :, -1])
        return out.flatten(2, 3)

    def mask(self) -> Tensor:
        band = torch.ones(B, 1, 2, 2, 6)
        band[:, :, 0, 0, 1] = band[1, :, 1, :, 4] = 0
        return band


def test_bands() -> None:
    import hookattn

    torch.manual_seed(3)
    model = Bands().eval()
    x = draw(B, 12, E, seed=5, std=1.5)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, x, verify="full")
        q, k, v = model.parts(x)
        output = model(x).view(B, H, 2, 2, D)
    assert not trace.skipped and len(trace) == 1

    def blocks(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    def keys(x: Tensor) -> Tensor:
        band = torch.cat([x[:, :, 1:-3], x[:, :, 2:-2], x[:, :, 3:-1]], dim=3)
        ends = (x[:, :, i, None].expand(-1, -1, 2, -1, -1) for i in (0, -1))
        return blocks(torch.cat([next(ends), band, next(ends)], 3))

    ones = torch.ones(B, 1, 2, 2, 2)
    mask = blocks(torch.cat([ones, model.mask(), ones], -1)).bool()
    wanted: dict[str, Any] = {"q": blocks(q[:, :, 2:-2]), "k": keys(k), "v": keys(v), "mask": mask}
    check_call(trace[0], **wanted, scale=0.5, output=blocks(output))


def test_grouped_keys_are_kept_once() -> None:
    import hookattn

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv, self.other = nn.Linear(E, E), nn.Linear(E, E), nn.Linear(E, E)

        def parts(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            pairs = (heads(t, 2) for z in (self.kv(x), self.other(y)) for t in z.chunk(2, -1))
            return heads(self.q(x), H), *pairs

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            q, *rest = self.parts(x, y)
            k1, v1, k2, v2 = (t.repeat_interleave(2, 1) for t in rest)
            one, two = torch.cat([q @ k1.mT, q @ k2.mT], -1).softmax(-1).split([T, S], -1)
            return merge(one @ v1 + two @ v2)

    torch.manual_seed(4)
    model = Grouped().eval()
    x, y = draw(B, T, E, seed=1), draw(B, S, E, seed=2)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, (x, y), verify="full")
        q, k1, v1, k2, v2 = model.parts(x, y)
    assert len(trace) == 1 and not trace.skipped
    check_call(trace[0], q=q, k=torch.cat([k1, k2], 2), v=torch.cat([v1, v2], 2), scale=1.0)


def test_dropout_on_each_part() -> None:
    import hookattn

    class Apart(TwoSources):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            q, k1, v1, k2, v2 = self.parts(x, y)
            one, two = torch.cat([q @ k1.mT, q @ k2.mT], -1).softmax(-1).split([T, S], -1)
            return F.dropout(one, 0.3, True) @ v1 + F.dropout(two, 0.3, True) @ v2

    torch.manual_seed(5)
    model = Apart("split")
    x, y = draw(B, T, E, seed=1), draw(B, S, E, seed=2)
    with torch.no_grad():
        trace = hookattn.trace(model, (x, y), verify="full")
        q, k1, v1, k2, v2 = model.parts(x, y)
    assert len(trace) == 1 and not trace.skipped
    check_call(trace[0], q=q, k=torch.cat([k1, k2], 2), v=torch.cat([v1, v2], 2), scale=1.0, dropout=0.3)


class Unread(TwoSources):
    """What is not one attention with all the keys: listed, whatever becomes of it."""

    def half(self, q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
        return torch.cat([q @ k1.mT, q @ k2.mT], -1).softmax(-1)[..., :T] @ v1

    def scaled(self, q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
        weights = torch.cat([q @ k1.mT * 0.3, q @ k2.mT], -1).softmax(-1)
        return weights[..., :T] @ v1 + weights[..., T:] @ v2

    def queries(self, q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
        weights = torch.cat([q @ k1.mT, (q + 1) @ k2.mT], -1).softmax(-1)
        return weights[..., :T] @ v1 + weights[..., T:] @ v2


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("half", "only a part"),
        ("scaled", "scaled each in its own way"),
        ("queries", "the queries are not the same"),
    ],
)
def test_what_is_not_read_is_listed(how: str, says: str) -> None:
    import hookattn

    model = Unread(how).eval()
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, (draw(B, T, E, seed=1), draw(B, S, E, seed=2)), warns=True)
    assert not trace.calls
    assert [item.path for item in trace.skipped] == [""]
    assert says in trace.skipped[0].reason
