"""Axes by evidence: modules whose heads, queries and batch entries nothing but their history tells apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, einsum, nn

import hookattn
from tests.reference import assert_close, draw, trace_checked

B, T, S, H, D, E = 2, 7, 5, 3, 4, 12
SURE = dict.fromkeys("BHTSG", "followed")


KEPT: dict[str, Tensor] = {}  # not on the model, which a trace has to leave as it is


class Known(nn.Module):
    """An attention that keeps its own weights, B H T S, where a trace does not see it."""

    def keep(self, weights: Tensor, letters: str) -> Tensor:
        with torch._C.DisableTorchFunction():
            kept = weights.detach().clone().permute([letters.index(x) for x in "bhts"])
        KEPT["weights"] = kept
        return weights

    def check(self, x: Any, guesses: bool = False, **options: Any) -> Any:
        torch.manual_seed(1)
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(std=0.7)
            trace = trace_checked(hookattn.trace, self.eval(), x, guesses=guesses, verify="full", **options)
        assert len(trace) == 1 and not trace.skipped, (len(trace), trace.skipped)
        call = trace[0]
        assert call.certificate.status == "faithful"
        assert_close(call.weights, KEPT["weights"], 1e-6, "weights")
        if not guesses:
            assert dict(call.basis) == (SURE if not options else dict.fromkeys("BHTSG", "adapter"))
        return call


class Latent(Known):
    """Latent attention as it is run: the keys' projection is absorbed into the queries, and keys have no heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.c = nn.Linear(E, H * D), nn.Linear(E, 6)
        self.up, self.down = nn.Parameter(torch.empty(H, D, 6)), nn.Parameter(torch.empty(H, D, 6))

    def forward(self, x: Tensor) -> Tensor:
        c = self.c(x)
        q = einsum("bthd,hdc->bthc", self.q(x).view(len(x), -1, H, D), self.up)
        w = self.keep((einsum("bthc,bsc->bths", q, c) * 0.3).softmax(-1), "bths")
        return einsum("bthc,hdc->bthd", einsum("bths,bsc->bthc", w, c), self.down).flatten(2)


class SharedKeys(Known):
    """Keys without heads, and queries B T H D."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.how = nn.Linear(E, H * D), nn.Linear(E, D), nn.Linear(E, D), how
        self.w = nn.Parameter(torch.empty(E, H, D))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.q(x).view(b, t, H, D), self.k(x), self.v(x)
        if self.how == "rotated":
            angle = torch.polar(torch.ones(t, 1, D // 2), torch.rand(t, 1, D // 2))
            q = torch.view_as_real(torch.view_as_complex(q.unflatten(-1, (-1, 2))) * angle).flatten(3)
        if self.how == "projected by einsum":
            q = einsum("bte,ehd->bthd", x, self.w)
        if self.how == "matmul":
            w = self.keep((q @ k[:, None].mT * 0.5).softmax(-1), "bths")
            return (w @ v[:, None]).flatten(2)
        w = self.keep((einsum("bthd,bsd->bths", q, k) * 0.5).softmax(-1), "bths")
        return einsum("bths,bsd->bthd", w, v).flatten(2)


class Picked(Known):
    """Heads folded into the batch, then positions picked in some way."""

    def __init__(self, pick: Callable[[Tensor], Tensor], t: int) -> None:
        super().__init__()
        self.p, self.pick, self.t = nn.Linear(E, 3 * E), pick, t

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.reshape(b, t, H, D).transpose(1, 2).reshape(b * H, t, D) for y in self.p(x).chunk(3, -1))
        q, k, v = self.pick(q), self.pick(k), self.pick(v)
        w = (q @ k.mT * 0.5).softmax(-1)
        self.keep(w.unflatten(0, (b, H)), "bhts")
        return (w @ v).reshape(b, H, self.t, D).transpose(1, 2).flatten(2)


AT = torch.tensor([5, 1, 4, 6])
PICKS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "index": (lambda y: y[:, AT], 4),
    "a list": (lambda y: y[:, [0, 2, 3]], 3),
    "booleans": (lambda y: y[:, torch.tensor([True, False, True, True, False, True, True])], 5),
    "index_select": (lambda y: y.index_select(1, AT), 4),
    "gather": (lambda y: y.gather(1, AT[None, :, None].expand(y.shape[0], -1, y.shape[2])), 4),
    "take_along_dim": (lambda y: y.take_along_dim(AT[None, :, None], 1), 4),
    "flip": (lambda y: y.flip(1), T),
    "roll": (lambda y: y.roll(2, 1), T),
    "pad": (lambda y: nn.functional.pad(y, (0, 0, 1, 0)), T + 1),
    "rows and columns": (lambda y: y[torch.arange(len(y))[:, None], AT], 4),
    "strides": (lambda y: y.as_strided((y.shape[0], 4, D), (y.stride(0), 2 * y.stride(1), 1)), 4),
    "written to a buffer": (lambda y: _written(y), T),
    "one window": (lambda y: y.unfold(1, 4, 3)[:, 0].mT, 4),
    "cumsum": (lambda y: y.cumsum(1), T),
    "index_add": (lambda y: torch.zeros_like(y).index_add(1, torch.arange(T).flip(0), y), T),
    "scatter": (lambda y: y.scatter(1, torch.zeros(y.shape[0], 1, D, dtype=torch.long), y[:, 3:4]), T),
    "foreach": (lambda y: torch._foreach_mul([y], 2.0)[0], T),
}


def _written(y: Tensor) -> Tensor:
    buffer = torch.zeros(y.shape[0], T + 3, D)
    buffer[:, 1 : T + 1] = y
    return buffer[:, 1 : T + 1]


class PerHead(Known):
    """A list of linear maps, one a head, in each way of putting their results together."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.ModuleList([nn.Linear(E, D) for _ in range(H)]) for _ in range(3))
        self.how = how

    def heads(self, maps: nn.ModuleList, x: Tensor) -> Tensor:
        b = len(x)
        if self.how == "stack":
            return torch.stack([m(x) for m in maps], 1)
        if self.how == "stack last":
            return torch.stack([m(x) for m in maps], -2).transpose(1, 2)
        if self.how == "cat":
            return torch.cat([m(x) for m in maps], -1).view(b, -1, H, D).transpose(1, 2)
        return torch.cat([m(x) for m in maps], 0).view(H, b, -1, D).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(maps, x) for maps in (self.q, self.k, self.v))
        return (self.keep((q @ k.mT * 0.5).softmax(-1), "bhts") @ v).transpose(1, 2).flatten(2)


class Windows(Known):
    """B H W T D: windows between heads and positions."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.p, self.h = nn.Linear(E, 3 * E), heads

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.p(x).reshape(b, n // 3, 3, 3, self.h, -1).permute(3, 0, 4, 2, 1, 5)
        w = (q @ k.mT * 0.5).softmax(-1)
        self.keep(w.transpose(1, 2).flatten(0, 1), "bhts")
        return (w @ v).transpose(1, 3).reshape(b, n, -1)


class Tokens(Known):
    """Positions that a linear map made of one vector, which attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.p = nn.Linear(E, T * E), nn.Linear(E, 3 * E)

    def forward(self, z: Tensor) -> Tensor:
        x = self.made(z).view(len(z), T, E)
        q, k, v = (y.view(len(z), T, H, D).transpose(1, 2) for y in self.p(x).chunk(3, -1))
        return (self.keep((q @ k.mT * 0.5).softmax(-1), "bhts") @ v).transpose(1, 2).flatten(2)


class EachHeadMapped(Known):
    """Heads are split first, and one linear map of their width is shared by all."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x.view(len(x), -1, H, D)
        q, k, v = self.q(y), self.k(y), self.v(y)
        w = self.keep((einsum("nqhd,nkhd->nhqk", q, k) * 0.5).softmax(-1), "bhts")
        return einsum("nhqk,nkhd->nqhd", w, v).flatten(2)


class Grouped(Known):
    """Four query heads and two key heads; query head h reads key head h % 2, or h // 2."""

    def __init__(self, inner: bool, repeat: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.inner, self.repeat = (
            nn.Linear(E, 16),
            nn.Linear(E, 8),
            nn.Linear(E, 8),
            inner,
            repeat,
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        k, v = (y.view(b, t, 2, 4).transpose(1, 2) for y in (self.k(x), self.v(x)))
        q = self.q(x).view(b, t, 2, 2, 4)
        if self.repeat:
            q, k, v = q.flatten(2, 3).transpose(1, 2), k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
            return (self.keep((q @ k.mT * 0.5).softmax(-1), "bhts") @ v).transpose(1, 2).flatten(2)
        if self.inner:  # b t r g d
            w = (einsum("btrgd,bgsd->brgts", q, k) * 0.5).softmax(-1)
            self.keep(w.flatten(1, 2), "bhts")
            return einsum("brgts,bgsd->btrgd", w, v).flatten(2)
        w = (einsum("btgrd,bgsd->brgts", q, k) * 0.5).softmax(-1)  # the axes in another order than in the width
        self.keep(w.transpose(1, 2).flatten(1, 2), "bhts")
        return einsum("brgts,bgsd->btgrd", w, v).flatten(2)


class Channels(Known):
    """Attention across channels: features attend to features, and the product sums over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Linear(E, 3 * E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.p(x).reshape(len(x), -1, 3, H, D).permute(2, 0, 3, 4, 1)
        return (self.keep((q @ k.mT * 0.1).softmax(-1), "bhts") @ v).flatten(1, 2).mT


class Query(Known):
    """A learned query for each head, and keys with heads of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.k, self.v = nn.Parameter(torch.empty(H, D)), nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        k, v = (y.view(len(x), -1, H, D) for y in (self.k(x), self.v(x)))
        w = (einsum("hd,bshd->bhs", self.query, k) * 0.5).softmax(-1)
        self.keep(w[:, :, None], "bhts")
        return einsum("bhs,bshd->bhd", w, v).flatten(1)


MODELS: dict[str, tuple[Callable[[], Known], tuple[int, ...]]] = {
    "latent": (Latent, (B, T, E)),
    **{f"keys without heads, {x}": (lambda x=x: SharedKeys(x), (B, T, E)) for x in ("plain", "rotated", "matmul")},  # type: ignore[misc]
    "keys without heads, projected by einsum": (lambda: SharedKeys("projected by einsum"), (B, T, E)),
    **{f"picked by {n}": (lambda p=p: Picked(*p), (B, T, E)) for n, p in PICKS.items()},  # type: ignore[misc]
    **{f"a map a head, {x}": (lambda x=x: PerHead(x), (B, T, E)) for x in ("stack", "stack last", "cat", "cat first")},  # type: ignore[misc]
    **{f"windows, {h} heads": (lambda h=h: Windows(h), (B, 12, E)) for h in (1, 2, 4)},  # type: ignore[misc]
    "tokens made of features": (Tokens, (B, E)),
    "each head mapped": (EachHeadMapped, (B, T, E)),
    "groups inside": (lambda: Grouped(True, False), (B, T, E)),
    "groups outside, laid otherwise": (lambda: Grouped(False, False), (B, T, E)),
    "groups repeated": (lambda: Grouped(True, True), (B, T, E)),
    "across channels": (Channels, (B, T, E)),
    "a learned query a head": (Query, (B, T, E)),
    "one batch entry": (Latent, (1, T, E)),
    "one position": (lambda: SharedKeys("plain"), (B, 1, E)),
    "as many positions as heads": (Latent, (B, H, E)),
    "as many batch entries as heads": (lambda: SharedKeys("matmul"), (H, H, E)),
}


@pytest.mark.parametrize("name", MODELS)
def test_axes_are_followed(name: str) -> None:
    make, shape = MODELS[name]
    make().check(draw(*shape, std=1.3))


@pytest.mark.parametrize("name", MODELS)
def test_values_decide_nothing_of_the_layout(name: str) -> None:
    make, shape = MODELS[name]
    model, shapes = make().eval(), set()
    with torch.no_grad():
        for seed, std in enumerate((0.0, 0.5, 3.0, 40.0)):
            torch.manual_seed(seed)
            for p in model.parameters():
                p.normal_(std=0.7)
            call = hookattn.trace(model, draw(*shape, std=std, seed=seed))[0]
            shapes.add((tuple(call.weights.shape), tuple(call.q.shape), tuple(call.k.shape), *call.basis.values()))
    assert len(shapes) == 1


class Core(Known):
    """Queries, keys and values are given with their heads, and nothing tells which axis is which."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.keep((einsum("thbd,shbd->thbs", q, k) * 0.5).softmax(-1), "thbs")
        return einsum("thbs,shbd->thbd", w, v)


def test_convention_is_called_a_guess_and_settled_by_a_layout() -> None:
    q, k, v = draw(T, H, B, D), draw(S, H, B, D, seed=1), draw(S, H, B, D, seed=2)
    with torch.no_grad():
        call = trace_checked(hookattn.trace, Core().eval(), (q, k, v), guesses=True)[0]
    assert {x for x, how in call.basis.items() if how == "guessed"} >= {"B", "H"}
    Core().check((q, k, v), layout={"": "THBD"})


def test_learned_queries_without_heads_are_a_guess() -> None:
    class Pool(Known):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.k, self.v = nn.Parameter(torch.empty(6, D)), nn.Linear(E, D), nn.Linear(E, D)

        def forward(self, x: Tensor) -> Tensor:
            w = (self.query @ self.k(x).mT / math.sqrt(D)).softmax(-1)
            self.keep(w[:, None], "bhts")
            return w @ self.v(x)

    call = Pool().check(draw(B, T, E), guesses=True)
    assert call.basis["T"] == "guessed" and call.basis["B"] == "followed"


class HeadsFirst(Known):
    """sdpa that is given heads where it expects the batch: its output is the same."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.h = how, 1 if how == "one head" else 4
        self.w, self.query = nn.Parameter(torch.empty(3, self.h, E, D)), nn.Parameter(torch.empty(self.h, T, D))
        self.maps = nn.ModuleList([nn.Linear(E, D) for _ in range(3 * self.h)])
        self.k = nn.Linear(E, 2 * D)

    def made(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.how == "maps":
            return tuple(torch.stack([m(x) for m in self.maps[i::3]]) for i in range(3))
        q, k, v = (einsum("bti,hid->hbtd", x, w) for w in self.w)
        if self.how == "learned queries":
            q = self.query.expand(len(x), -1, -1, -1).transpose(0, 1)
        if self.how == "groups in the batch":  # two groups of two heads: B·G R T D
            q = q.unflatten(0, (2, 2)).permute(2, 0, 1, 3, 4).flatten(0, 1)
            k = v = self.k(x).view(*x.shape[:2], 2, D).transpose(1, 2).flatten(0, 1)[:, None].expand(-1, 2, -1, -1)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.made(x)
        w = (q @ k.mT * 0.5).softmax(-1)
        folded = self.how == "groups in the batch"
        with torch._C.DisableTorchFunction():
            self.keep(w.view(len(x), 4, *w.shape[2:]) if folded else w, "bhts" if folded else "hbts")
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)


@pytest.mark.parametrize("batch", [1, B, 4])
@pytest.mark.parametrize("how", ["parameters", "maps", "one head", "groups in the batch", "learned queries"])
def test_heads_where_sdpa_has_the_batch(how: str, batch: int) -> None:
    torch.manual_seed(1)
    model, x = HeadsFirst(how).eval(), draw(batch, T, E, std=1.3)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.7)
        calls = [c for c in hookattn.trace(model, x, verify="full") if c.tap == "sdpa"]
    assert len(calls) == 1
    assert_close(calls[0].weights, KEPT["weights"], 1e-6, "weights")
    assert "guessed" not in calls[0].basis.values()


class OnePosition(Known):
    """One query and one key: no extent tells which dimension is whose, and the weights of a softmax are all 1."""

    def __init__(self, score: str, normalizer: str, heads: int, maps: str) -> None:
        super().__init__()
        self.score, self.normalizer, self.h = score, normalizer, heads
        self.p, self.w = nn.Linear(E, 3 * heads * D), nn.Parameter(torch.empty(3, heads, E, D))
        self.maps = maps

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        if self.score == "products":
            return (q[:, :, :, None] * k[:, :, None]).sum(-1)
        if self.score == "distances":
            return -(q.unsqueeze(3) - k.unsqueeze(2)).pow(2).sum(-1)
        if self.score == "cosines":
            return nn.functional.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
        if self.score == "keys first":
            return (k.flatten(0, 1) @ q.flatten(0, 1).mT).unflatten(0, (len(q), self.h)).add(0.1).flatten(0, 1).mT
        return q @ k.mT

    def forward(self, x: Tensor) -> Tensor:
        if self.maps == "a parameter":
            q, k, v = (einsum("bti,hid->bhtd", x, w) for w in self.w)
        else:
            q, k, v = (y.view(len(x), -1, self.h, D).transpose(1, 2) for y in self.p(x).chunk(3, -1))
        KEPT["q"] = q.detach().clone()
        s = self.scores(q, k)
        if self.score == "keys first":
            v = v.flatten(0, 1)
        if self.normalizer == "late":
            with torch._C.DisableTorchFunction():
                self.keep(s.softmax(-1), "bhts")
            e = s.exp()
            return (e[..., None] * v[:, :, None]).sum(-2) / e.sum(-1, keepdim=True)
        w = s.sigmoid() if self.normalizer == "sigmoid" else s.softmax(-1)
        kept = w.view(len(x), self.h, *w.shape[-2:]) if self.score == "keys first" else w
        with torch._C.DisableTorchFunction():
            self.keep(kept, "bhts")
        return w @ v


@pytest.mark.parametrize("maps", ["a layer", "a parameter"])
@pytest.mark.parametrize("heads", [1, H])
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
@pytest.mark.parametrize("score", ["products", "distances", "cosines", "matmul", "keys first"])
def test_one_query_and_one_key(score: str, normalizer: str, heads: int, maps: str) -> None:
    call = OnePosition(score, normalizer, heads, maps).check(draw(B, 1, E, std=1.3))
    if (q := call.get("q")) is not None:
        factor = (q * KEPT["q"]).sum() / KEPT["q"].square().sum()
        assert_close(q, factor * KEPT["q"], 1e-6, "q")


@pytest.mark.parametrize("length", [1, T])
@pytest.mark.parametrize("heads", [1, H])
def test_exponentials_times_values_added_up(heads: int, length: int) -> None:
    OnePosition("matmul", "late", heads, "a layer").check(draw(B, length, E, std=0.3))
