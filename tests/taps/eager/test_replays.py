"""Models whose attention is written out by hand, traced again and again: what is recognised is what following sees."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hookattn
from hookattn.models.registry import using
from tests.beside import checked_replays
from tests.reference import check_call, draw, heads, merge, same_bits
from tests.replayed import Counts, Scene, again, alike, play, seen, traced, without_recipes

B, T, S, E, H, D = 2, 5, 7, 16, 4, 4
X, Y = draw(B, T, E, seed=1), draw(B, S, E, seed=2)
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires")


class Attention(nn.Module):
    """An attention with the options in which the layers of a model differ."""

    def __init__(
        self, *, window: int | None = None, p: float = 0.0, scale: float = D**-0.5, rotary: bool = False, groups: int = H
    ) -> None:
        super().__init__()
        self.window, self.p, self.scale, self.rotary, self.groups = window, p, scale, rotary, groups
        self.q, self.kv, self.out = nn.Linear(E, E), nn.Linear(E, 2 * groups * D), nn.Linear(E, E)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        y = x if memory is None else memory
        q = heads(self.q(x), H)
        k, v = (heads(one, self.groups) for one in self.kv(y).chunk(2, -1))
        if self.groups < H:
            k, v = (one.repeat_interleave(H // self.groups, 1) for one in (k, v))
        if self.rotary:
            q, k = rotated(q), rotated(k)
        scores = q @ k.transpose(-2, -1) * self.scale
        if memory is None:
            scores = scores.masked_fill(~self.visible(x.shape[1]), -math.inf)
        weights = F.dropout(scores.softmax(-1), self.p, self.training)
        return self.out(merge(weights @ v))

    def visible(self, n: int) -> Tensor:
        ones = torch.ones(n, n, dtype=torch.bool).tril()
        return ones if self.window is None else ones.triu(1 - self.window)


def rotated(x: Tensor) -> Tensor:
    t = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / 10 ** torch.arange(0, D, 2, dtype=x.dtype)
    cos, sin = t.cos().repeat(1, 2), t.sin().repeat(1, 2)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Layer(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(E), Attention(**options)
        self.mlp = nn.Sequential(nn.LayerNorm(E), nn.Linear(E, 2 * E), nn.GELU(), nn.Linear(2 * E, E))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Model(nn.Module):
    """Layers one after another."""

    def __init__(self, *options: dict[str, Any], recompute: bool | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(**one) for one in options])
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.recompute is None else checkpoint(layer, x, use_reentrant=self.recompute)
        return x


plain = partial(Model, {}, {}, {}, {})


class Ours(hookattn.Adapter):
    name, covers = "replays", (__name__,)
    attention = {"Attention": "self"}


@pytest.fixture(params=["whole", "sites"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Whether a model is watched as a whole, or at the sites that an adapter names alone."""
    with using(*([Ours()] if request.param == "sites" else [])):
        yield request.param


def recognised(counts: list[Counts], start: int = 1) -> None:
    """Traces from one on are recognised; the first of them may have to look again at what is left at the end of runs."""
    for i, one in enumerate(counts[start:], start):
        few = one.recognised // 10
        assert one.recognised and one.followed <= few, f"trace {i} of {counts}"
        assert one.paid <= few or i == start, f"trace {i} of {counts}"


# ------------------------------------------------------------------------------------------------- layers


def test_layers_that_are_alike(way: str) -> None:
    """All but the first are recognised in the first trace."""
    counts = play(plain, again(X), calls=4)
    recognised(counts)
    first, later = counts[0], counts[1]
    assert first.recognised > 0.4 * later.recognised, "layers are alike"


OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "local and global": ({}, {"window": 2}, {}, {"window": 2}),
    "dropout": ({"p": 0.3}, {}, {"p": 0.3}, {"p": 0.1}),
    "scales": ({}, {"scale": 1.0}, {"scale": 0.25}, {"scale": 1}),
    "rotary or not": ({"rotary": True}, {"rotary": True}, {}, {"rotary": True}),
    "grouped or not": ({"groups": 2}, {}, {"groups": 1}, {"groups": 2}),
    "all": ({"rotary": True, "p": 0.2}, {"groups": 2, "window": 3}, {"scale": 1.0}, {"rotary": True, "groups": 2}),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_layers_that_differ_in_an_option(way: str, name: str, train: bool) -> None:
    counts = play(lambda: Model(*OPTIONS[name]).train(train), again(X), calls=4)
    recognised(counts)


def test_against_explicit_math(way: str) -> None:
    """Every trace has the q, k, v, mask and weights that the layers' own parameters make of their input."""
    model = Model({"window": 2}, {"rotary": True}, {"scale": 1.0}).double().eval()
    x = X.double()
    for _ in range(3):
        trace = hookattn.trace(model, x)
        y = x
        for layer, call in zip(model.layers, trace, strict=True):
            a = layer.attention
            q = heads(a.q(layer.norm(y)), H)
            k, v = (heads(one, H) for one in a.kv(layer.norm(y)).chunk(2, -1))
            if a.rotary:
                q, k = rotated(q), rotated(k)
            check_call(call, q=q, k=k, v=v, scale=a.scale, mask=a.visible(T)[None, None])
            y = layer(y)


class InOneModule(nn.Module):
    """A loop over layers in one module, of stacked parameters."""

    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.W_Q, self.W_K, self.W_V, self.W_O = (nn.Parameter(draw(n, E, E, seed=i, std=0.3)) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.W_Q)):
            q, k, v = (heads(x @ w[i], H) for w in (self.W_Q, self.W_K, self.W_V))
            x = x + merge((q @ k.mT / math.sqrt(D)).softmax(-1) @ v) @ self.W_O[i]
        return x


class RawParameters(nn.Module):
    """``x @ self.W`` by head, with einsum, and tied: keys are made of what makes queries in the layer below."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.ParameterList([draw(H, E, D, seed=i, std=0.4) for i in range(5)])
        self.W_O = nn.Parameter(draw(H, D, E, seed=9, std=0.3))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(4):
            q, k, v = (torch.einsum("bte,hed->bhtd", x, self.W[j]) for j in (i, i + 1, 4 - i))
            weights = torch.einsum("bhtd,bhsd->bhts", q, k).div(D**0.5).softmax(dim=-1)
            x = x + torch.einsum("bhtd,hde->bte", torch.einsum("bhts,bhsd->bhtd", weights, v), self.W_O)
        return x


class SelfAndCross(nn.Module):
    """Two attentions in one module, with weights that are read and used again."""

    def __init__(self) -> None:
        super().__init__()
        self.mine, self.other, self.out = nn.Linear(E, 3 * E), nn.Linear(E, 2 * E), nn.Linear(2 * E, E)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (heads(one, H) for one in self.mine(x).chunk(3, -1))
        here = ((q @ k.mT) * D**-0.5).softmax(-1) @ v
        k, v = (heads(one, H) for one in self.other(y).chunk(2, -1))
        there = ((q @ k.mT) * D**-0.5).softmax(-1) @ v
        return self.out(torch.cat([merge(here), merge(there)], -1))


class Differential(nn.Module):
    """The difference of two softmaxes meets the values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(E, n) for n in (2 * E, 2 * E, E, E))
        self.lam = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        q1, q2 = (heads(one, H) for one in self.q(x).chunk(2, -1))
        k1, k2 = (heads(one, H) for one in self.k(x).chunk(2, -1))
        v = heads(self.v(x), H)
        one, two = ((q @ k.mT / 2).softmax(-1) for q, k in ((q1, k1), (q2, k2)))
        return x + self.out(merge((one - self.lam * two) @ v))


class TwoOutputs(Differential):
    """As an author would who knows that v can be multiplied twice."""

    def forward(self, x: Tensor) -> Tensor:
        q1, q2 = (heads(one, H) for one in self.q(x).chunk(2, -1))
        k1, k2 = (heads(one, H) for one in self.k(x).chunk(2, -1))
        v = heads(self.v(x), H)
        one, two = ((q @ k.mT / 2).softmax(-1) @ v for q, k in ((q1, k1), (q2, k2)))
        return x + self.out(merge(one - self.lam * two))


class Chunked(nn.Module):
    """Queries in chunks, the last of them smaller."""

    def __init__(self, size: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.size, self.qkv = size, nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.qkv:
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            parts = []
            for start in range(0, x.shape[1], self.size):
                scores = q[:, :, start : start + self.size] @ k.mT / math.sqrt(D)
                parts.append(scores.softmax(-1) @ v)
            x = x + merge(torch.cat(parts, 2))
        return x


class Loops(Chunked):
    """A head at a time, as three loops in one."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.qkv:
            q, k, v = layer(x).chunk(3, -1)
            outs = []
            for h in range(H):
                part = slice(h * D, (h + 1) * D)
                weights = torch.softmax(q[..., part].matmul(k[..., part].transpose(1, 2)) / 2, dim=-1)
                outs.append(weights.matmul(v[..., part]))
            x = x + torch.cat(outs, dim=-1)
        return x


class HeadModules(nn.Module):
    """Karpathy's first: a module for each head."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.query, self.value = (nn.Linear(E, D, bias=False) for _ in range(3))
            self.register_buffer("tril", torch.tril(torch.ones(8, 8)))

        def forward(self, x: Tensor) -> Tensor:
            t = x.shape[1]
            k, q = self.key(x), self.query(x)
            wei = q @ k.transpose(-2, -1) * D**-0.5
            wei = wei.masked_fill(self.tril[:t, :t] == 0, float("-inf"))
            return F.softmax(wei, dim=-1) @ self.value(x)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleList([self.Head() for _ in range(H)]) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.cat([head(x) for head in block], dim=-1)
        return x


class SharedKeys(nn.Module):
    """Keys and values of the first layer, read by all."""

    def __init__(self) -> None:
        super().__init__()
        self.kv, self.q = nn.Linear(E, 2 * E), nn.ModuleList([nn.Linear(E, E) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        k, v = (heads(one, H) for one in self.kv(x).chunk(2, -1))
        for q in self.q:
            x = x + merge((heads(q(x), H) @ k.mT / 2).softmax(-1) @ v)
        return x


class WeightsAgain(nn.Module):
    """Weights come back with the output, and meet other values after all layers: a rollout, and a copy head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(3)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first, found = x, []
        for layer in self.layers:
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            weights = (q @ k.mT / 2).softmax(-1)
            x = x + merge(weights @ v)
            found.append(weights)
        copied = found[-1].mean(1) @ first
        return x, copied, *found


class Tied(nn.Module):
    """One layer, run several times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(rotary=True)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.layer(x)
        return x


class Between(nn.Module):
    """Fused attention between attention that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            out = F.scaled_dot_product_attention(q, k, v) if i % 2 else (q @ k.mT / 2).softmax(-1) @ v
            x = x + merge(out)
        return x


class Steps(nn.Module):
    """A softmax in steps, in float32, with a cap."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            scores = torch.tanh(q @ k.mT / 2 / 5.0) * 5.0
            mass = (scores - scores.amax(-1, keepdim=True)).exp()
            x = x + merge((mass @ v) / mass.sum(-1, keepdim=True))
        return x


ONE_INPUT = (InOneModule, RawParameters, Differential, TwoOutputs, Chunked, Loops, HeadModules, SharedKeys)
ONE_INPUT += (WeightsAgain, Tied, Between, Steps)  # type: ignore[assignment]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("build", ONE_INPUT, ids=lambda build: build.__name__)
def test_models_in_other_hands(build: Callable[[], nn.Module], grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        recognised(play(build, again(X)))


@pytest.mark.parametrize("build", ONE_INPUT, ids=lambda build: build.__name__)
def test_other_lengths_and_back(build: Callable[[], nn.Module]) -> None:
    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for n in (5, 3, 5, 3, 1, 5, 1, 3, 1):
            yield trace(model, X[:, :n])

    counts = play(build, scene, math=build is not RawParameters)
    recognised([counts[2], counts[5]], 0)
    recognised([counts[3], counts[7]], 0)
    recognised([counts[6], counts[8]], 0)


def test_self_and_cross_in_one_module() -> None:
    recognised(play(SelfAndCross, again((X, Y))))

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for y in (Y, Y[:, :5], X, Y, X, Y[:, :5]):  # of another sequence, or of the same
            yield trace(model, (X, y))

    recognised(play(SelfAndCross, scene), 3)


def test_fields_of_a_trace_decide_what_is_kept(way: str) -> None:
    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for capture in (None, ("weights",), ("q", "k"), ("scores",), None, ("weights",), ("scores", "output")):
            yield trace(model, X, capture=capture)
        yield trace(model, X, heads=[2], queries=slice(-2, None))
        yield trace(model, X, dtype=torch.float64)
        yield trace(model, X, layers=[-1])

    play(plain, scene, math=False)


# ----------------------------------------------------------------------------------------- generation


class Cached(nn.Module):
    """Layers with a cache of keys and values, as they are generated with."""

    def __init__(self, n: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(n)])

    def forward(self, x: Tensor, past: list[tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, Any]:
        now = []
        for i, layer in enumerate(self.layers):
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            if past is not None:
                k, v = torch.cat([past[i][0], k], 2), torch.cat([past[i][1], v], 2)
            now.append((k, v))
            t, s = q.shape[2], k.shape[2]
            hidden = torch.ones(t, s).triu(s - t + 1).bool()
            x = x + merge((q @ k.mT / 2).masked_fill(hidden, -math.inf).softmax(-1) @ v)
        return x, now


class Static(Cached):
    """As :class:`Cached`, in buffers that are written to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(2, B, H, 12, D))
        self.register_buffer("v", torch.zeros(2, B, H, 12, D))

    def forward(self, x: Tensor, at: int = 0) -> Tensor:  # type: ignore[override]
        t = x.shape[1]
        for i, layer in enumerate(self.layers):
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            self.k[i, :, :, at : at + t] = k
            self.v[i, :, :, at : at + t] = v
            seen = torch.arange(12)[None, :] <= torch.arange(at, at + t)[:, None]
            scores = (q @ self.k[i].mT / 2).masked_fill(~seen, torch.finfo(q.dtype).min)
            x = x + merge(scores.softmax(-1) @ self.v[i])
        return x


@pytest.mark.parametrize("build", [Cached, Static])
def test_generation_in_one_block(build: Callable[[], nn.Module]) -> None:
    """The keys grow with each step; a second generation is recognised."""

    def generate(model: Any) -> list[Tensor]:
        torch.manual_seed(1)
        outs, past, x = [], None, X[:, :3]
        for at in (0, 3, 4, 5, 6):
            if build is Static:
                y = model(x, at)
            else:
                y, past = model(x, past)
            outs.append(y)
            x = y[:, -1:]
        return outs

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for _ in range(3):
            if trace is traced:
                with hookattn.tracing(model) as running:
                    running.output = generate(model)
                yield running
            else:
                yield type("Untraced", (), {"output": generate(model)})

    with torch.no_grad():
        counts = play(build, scene, calls=10)
    recognised(counts)


# --------------------------------------------------------------------------------- modes of torch


@pytest.mark.parametrize("build", [plain, InOneModule, Chunked])
def test_grad_mode_and_autocast_between_runs(way: str, build: Callable[[], nn.Module]) -> None:
    if way == "sites" and build is not plain:
        return
    modes: dict[str, Callable[[], Any]] = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
        "float16": lambda: torch.autocast("cpu", torch.float16),
    }
    order = ["grad", "no_grad", "inference", "bfloat16", "grad", "bfloat16", "float16", "inference", "no_grad"]

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for name in order:
            with modes[name]():
                found = trace(model, X)
            yield found

    counts = play(build, scene, math=False)
    recognised(counts[4:6], 0)
    recognised(counts[7:], 0)


@pytest.mark.parametrize("recompute", [False, True])
def test_checkpointed_with_backward(way: str, recompute: bool) -> None:
    """What is run again in backward is no call, and the gradients are those without a trace."""
    x = X.clone().requires_grad_()

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for _ in range(3):
            model.zero_grad()
            x.grad = None
            if trace is not traced:
                found = trace(model, x)
                found.output.sum().backward()
            else:
                torch.manual_seed(3)
                with hookattn.tracing(model) as found:
                    found.output = model(x)
                    found.output.sum().backward()
            grads = [p.grad.clone() for p in model.parameters()]
            found.output = [found.output.detach(), x.grad.clone(), *grads]
            yield found

    for p in (0.0, 0.2):
        build = partial(Model, {"p": p}, {"p": p}, {"p": p}, recompute=recompute)
        recognised(play(lambda: build().train(), scene, calls=3))


def test_gradients_through_what_is_recognised(way: str) -> None:
    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for _ in range(3):
            model.zero_grad()
            found = trace(model, X)
            found.output.square().sum().backward()
            found.output = [found.output.detach(), *(p.grad.clone() for p in model.parameters())]
            yield found

    recognised(play(plain, scene))


# ------------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("checked", [False, True])
def test_threads(way: str, checked: bool) -> None:
    """Two threads trace one model, and a third another, at the same time."""
    torch.manual_seed(0)
    model, other = plain(), Model({"rotary": True}, {"window": 2})
    jobs = [(model, X), (model, X[:, :3]), (other, X), (model, X)]
    with without_recipes():
        expected = [seen(hookattn.trace(*job)) for job in jobs]
    barrier = threading.Barrier(len(jobs), timeout=30)

    def work(i: int) -> None:
        with torch.enable_grad():
            for n in range(5):
                barrier.wait()
                alike(seen(hookattn.trace(*jobs[i])), expected[i], f"thread {i}, trace {n}")

    def run() -> None:
        with ThreadPoolExecutor(len(jobs)) as pool:
            for future in [pool.submit(work, i) for i in range(len(jobs))]:
                future.result()

    if not checked:
        run()
        return
    with checked_replays() as count:
        run()
        assert count["recognised"]  # one of the two that trace one model goes without recipes


def test_a_trace_in_another_thread_while_one_is_half_done() -> None:
    """In the middle of the first the second runs from beginning to end."""
    torch.manual_seed(0)
    model = plain()
    with without_recipes():
        expected = seen(hookattn.trace(model, X))
    inner: list[Any] = []

    def meet(*_: Any) -> None:
        if not inner:
            inner.append(None)
            thread = threading.Thread(target=lambda: inner.append(seen(hookattn.trace(model, X))))
            thread.start()
            thread.join()

    handle = model.layers[2].register_forward_pre_hook(meet)
    for _ in range(3):
        inner.clear()
        outer = seen(hookattn.trace(model, X))
        alike(outer, expected, "outer")
        alike(inner[1], expected, "inner")
    handle.remove()
    recognised(play(plain, again(X)))


# ---------------------------------------------------------------------------- order and data-dependent flow


class Dropped(Model):
    """Layers are dropped at random, and the last are left out where the input is small."""

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if torch.rand(()) < 0.4:
                continue
            x = layer(x)
            if i > 1 and bool(x.abs().mean() < 0.5):
                break
        return x


def test_layers_that_are_left_out(way: str) -> None:
    build = partial(Dropped, {}, {"window": 2}, {}, {"rotary": True}, {"scale": 1.0})

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for seed in range(12):
            model.register_forward_pre_hook(lambda *_, seed=seed: torch.manual_seed(seed) and None)
            yield trace(model, X if seed % 3 else X * 0.1)

    counts = play(build, scene)
    assert sum(one.recognised for one in counts[4:]) > sum(one.followed for one in counts[4:])


class Routed(nn.Module):
    """Only some tokens attend, told by their values; then as many as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.layers = nn.Linear(E, 1), nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            chosen = self.gate(x[0]).squeeze(-1) > 0
            part = x[0][chosen]
            q, k, v = (one.unflatten(-1, (H, D)).transpose(0, 1) for one in layer(part).chunk(3, -1))
            out = ((q @ k.mT / 2).softmax(-1) @ v).transpose(0, 1).flatten(1)
            y = x[0].clone()
            y[chosen] = y[chosen] + out
            x = y[None]
        return x


def test_boolean_indexing_of_other_counts() -> None:
    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for seed in (1, 2, 1, 3, 1, 2, 2):
            yield trace(model, draw(1, 9, E, seed=seed))

    counts = play(Routed, scene, calls=3)
    recognised([counts[2], counts[4]], 0)
    recognised(counts[5:], 0)


class Sorted(nn.Module):
    """A list of examples of other lengths, an attention for each."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)

    def forward(self, *xs: Tensor) -> list[Tensor]:
        outs = []
        for x in sorted(xs, key=len):
            q, k, v = (one.view(-1, H, D).transpose(0, 1) for one in self.qkv(x).chunk(3, -1))
            outs.append(((q @ k.mT / 2).softmax(-1) @ v).transpose(0, 1).reshape(-1, E))
        return outs


def test_one_example_after_another() -> None:
    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for lengths in ((3, 5, 2), (5, 5, 5), (2, 3, 5), (7,), (5, 5, 5), (1, 2, 3, 5, 7)):
            yield trace(model, tuple(draw(n, E, seed=n) for n in lengths))

    play(Sorted, scene)


# -------------------------------------------------------------------------- tensors of another kind


class Own(Tensor):
    """A class of somebody's own."""


class Batched(nn.Module):
    """``vmap`` over heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT / 2).softmax(-1) @ v

        for layer in self.qkv:
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            x = x + merge(torch.vmap(attend, 1, 1)(q, k, v))
        return x


def test_vmap() -> None:
    play(Batched, again(X))


def test_a_model_under_vmap_and_without() -> None:
    torch.manual_seed(0)
    model = InOneModule(2)

    def both() -> list[Any]:
        found = [seen(hookattn.trace(model, X))]
        with hookattn.tracing(model) as trace:
            trace.output = torch.vmap(model)(X[:, None])
        return [*found, seen(trace), seen(hookattn.trace(model, X))]

    with without_recipes():
        expected = both()
    for _ in range(3):
        for one, other in zip(both(), expected, strict=True):
            alike(one, other, "vmap or not")


def test_a_subclass_between_runs(way: str) -> None:
    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for x in (X, X.as_subclass(Own), X, X.as_subclass(Own), X):
            found = trace(model, x)
            found.output = found.output.as_subclass(Tensor)
            yield found

    recognised(play(plain, scene)[2::2], 0)


def test_nested_tensors_between_runs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(E, E) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.q(x), self.k(x), self.v(x)
            return (q @ k.transpose(1, 2) / 4).softmax(-1) @ v

    def outputs(x: Tensor) -> list[Tensor]:
        return [one.detach() for one in (x.unbind() if x.is_nested else [x])]

    torch.manual_seed(0)
    model = Net()
    nested = torch.nested.nested_tensor([X[0, :3], X[1]])
    with without_recipes():
        expected = seen(traced(model, X))
    plain_nested = outputs(model(nested))
    for _ in range(3):
        alike(seen(traced(model, X)), expected, "dense")
        with hookattn.tracing(model) as trace:
            model(X)
            out = outputs(model(nested))
        assert same_bits(out, plain_nested) and len(trace.select(step=0)) == 1
