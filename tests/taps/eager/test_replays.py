"""Models whose attention is written out by hand, traced again and again: what is recognised is what following sees."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from tests.beside import checked_replays
from tests.hands import (
    B,
    Batched,
    Between,
    Cached,
    Chunked,
    Differential,
    Dropped,
    E,
    H,
    HeadModules,
    InOneModule,
    Loops,
    Model,
    OneBuffer,
    RawParameters,
    Routed,
    SelfAndCross,
    SharedKeys,
    Sorted,
    Static,
    Steps,
    Tied,
    TwoOutputs,
    WeightsAgain,
    plain,
    rotated,
)
from tests.reference import check_call, draw, heads, same_bits
from tests.replayed import Counts, again, alike, play, seen, traced, without_recipes

T, S = 5, 7
X, Y = draw(B, T, E, seed=1), draw(B, S, E, seed=2)
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires")


class Ours(hookattn.Adapter):
    name, covers = "replays", ("tests.hands",)
    attention = {"Attention": "self"}


def recognised(counts: list[Counts], start: int = 1) -> None:
    """Traces from one on are recognised; at the first of them it may be found out what is left at the end of runs."""
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


ONE_INPUT = (InOneModule, RawParameters, Differential, TwoOutputs, Chunked, Loops, HeadModules, SharedKeys)
ONE_INPUT += (WeightsAgain, Tied, Between, Steps)  # type: ignore[assignment]


# In the first trace it is found out that one attention reaches into the next: learned as a whole in the second.
WHOLE = (InOneModule, RawParameters, WeightsAgain)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("build", ONE_INPUT, ids=lambda build: build.__name__)
def test_models_in_other_hands(build: Callable[[], nn.Module], grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        counts = play(build, again(X, 5))
    if build is not Steps:  # where the softmax is finished after the values, all is followed
        recognised(counts, 2 if build in WHOLE else 1)


@pytest.mark.parametrize("build", ONE_INPUT, ids=lambda build: build.__name__)
def test_other_lengths_and_back(build: Callable[[], nn.Module]) -> None:
    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for n in (5, 3, 5, 3, 1, 5, 1, 3, 1):
            yield trace(model, X[:, :n])

    counts = play(build, scene, math=build is not RawParameters)
    if build not in (
        Steps,
        WeightsAgain,
    ):  # weights that are used again join two runs, which takes a trace more to learn
        recognised([counts[2], counts[5]], int(build in WHOLE))
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


@pytest.mark.parametrize("build", [Cached, Static, OneBuffer])
def test_generation_in_one_block(build: Callable[[], nn.Module]) -> None:
    """The keys grow with each step; a second generation is recognised."""

    def generate(model: Any) -> list[Tensor]:
        torch.manual_seed(1)
        outs, past, x = [], None, X[:, :3]
        for at in (0, 3, 4, 5, 6):
            if isinstance(model, Static):
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
    if build is not OneBuffer:  # a layer overwrites what the one before it may still need
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
    for i in (4, 5, 7, 8):  # each mode for the second time
        recognised([counts[i]], 0)


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


def test_layers_that_are_left_out(way: str) -> None:
    build = partial(Dropped, {}, {"window": 2}, {}, {"rotary": True}, {"scale": 1.0})

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for seed in range(12):
            model.register_forward_pre_hook(lambda *_, seed=seed: torch.manual_seed(seed) and None)
            yield trace(model, X if seed % 3 else X * 0.1)

    counts = play(build, scene)
    assert sum(one.recognised for one in counts[4:]) > sum(one.followed for one in counts[4:])


def test_boolean_indexing_of_other_counts() -> None:
    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for seed in (1, 2, 1, 3, 1, 2, 2):
            yield trace(model, draw(1, 9, E, seed=seed))

    counts = play(Routed, scene, calls=3)
    recognised([counts[2], counts[4]], 0)
    recognised(counts[5:], 0)


def test_one_example_after_another() -> None:
    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for lengths in ((3, 5, 2), (5, 5, 5), (2, 3, 5), (7,), (5, 5, 5), (1, 2, 3, 5, 7)):
            yield trace(model, tuple(draw(n, E, seed=n) for n in lengths))

    play(Sorted, scene)


# -------------------------------------------------------------------------- tensors of another kind


class Own(Tensor):
    """A class of somebody's own."""


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
