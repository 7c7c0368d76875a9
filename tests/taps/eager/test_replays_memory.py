"""Writes to memory beside what is recognised, and what is kept: recipes hold no tensor, and are bounded in number."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hookattn
from hookattn.taps.eager.recipe import Recipes, recipes_of
from tests.hands import B, Cached, Chunked, D, Dropped, E, H, Model, WeightsAgain, plain
from tests.reference import draw, heads, merge
from tests.replayed import alike, play, seen, traced, without_recipes
from tests.writes import BEHIND, IN_PLACE

T = 5
X = draw(B, T, E, seed=1)
Meet = Callable[[int, str, Tensor], Any]


class Attention(nn.Module):
    """An attention that shows somebody each of its tensors, at one place or another."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.qkv, self.out = number, nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.meet: Meet = lambda *_: None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(one, H) for one in self.qkv(x).chunk(3, -1))
        self.show("made", q=q, k=k, v=v)
        scores = q @ k.transpose(-2, -1)
        self.show("scored", q=q, k=k, v=v, scores=scores)
        scaled = scores / 2
        masked = scaled.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
        self.show("masked", q=q, k=k, scores=scores, scaled=scaled, masked=masked)
        weights = masked.softmax(-1)
        self.show("softmaxed", q=q, v=v, scaled=scaled, masked=masked, weights=weights)
        out = weights @ v
        self.show("used", q=q, k=k, v=v, scaled=scaled, masked=masked, weights=weights, out=out)
        return self.out(merge(out))

    def show(self, where: str, **tensors: Tensor) -> None:
        for name, x in tensors.items():
            self.meet(self.number, f"{name} {where}", x)


class Net(nn.Module):
    """Three of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(i) for i in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x

    def met_by(self, meet: Meet) -> None:
        for layer in self.layers:
            layer.meet = meet  # type: ignore[union-attr, assignment]


class Ours(hookattn.Adapter):
    name, covers = "replays", (__name__,)
    attention = {"Attention": "self"}


# ------------------------------------------------------------------------------------------------- writes

SPOTS = (
    *("q made", "k made", "v made", "q scored", "k scored", "v scored", "scores scored", "q masked", "scores masked"),
    *("scaled masked", "masked masked", "v softmaxed", "scaled softmaxed", "masked softmaxed", "weights softmaxed"),
    *("q used", "k used", "v used", "scaled used", "masked used", "weights used", "out used"),
)
OFTEN = {
    "mul_": lambda x: x.mul_(0.5),
    "view": lambda x: x.transpose(-1, -2)[..., ::2, :].neg_(),
    "out=": lambda x: torch.add(torch.ones_like(x), 1, out=x),
    "dropout": lambda x: F.dropout(x, 0.5, True, inplace=True),
}


def written(spot: str, write: Callable[[Tensor], Any], layers: tuple[int, ...] = (1,)) -> Any:
    """The scene of a model that is traced, then writes at a spot twice, then does not."""

    def meet(number: int, where: str, x: Tensor) -> None:
        if where == spot and number in layers:
            write(x)

    def scene(model: Any, trace: Callable[..., Any]) -> Iterator[Any]:
        for writes in (False, True, True, False):
            model.met_by(meet if writes else lambda *_: None)
            with torch.no_grad():
                yield trace(model, X)

    return scene


@pytest.mark.parametrize("spot", SPOTS)
@pytest.mark.parametrize("how", OFTEN)
def test_a_write_that_comes_only_later(spot: str, how: str) -> None:
    play(Net, written(spot, OFTEN[how]), math=False)


@pytest.mark.parametrize("how", [*IN_PLACE, *(how for how in BEHIND if how not in ("smaller", "freed storage"))])
def test_every_kind_of_write(how: str) -> None:
    write = {**IN_PLACE, **BEHIND}[how]
    if how in ("set_", ".data ="):  # of another size: the model would not go on
        return
    play(Net, written("q used", write, (0, 1)), math=False)


@pytest.mark.parametrize("spot", ["k scored", "masked softmaxed", "weights used", "q used"])
def test_a_write_that_is_always_there(way: str, spot: str) -> None:
    """In all layers, from the first run on; and then no more."""

    def meet(number: int, where: str, x: Tensor) -> None:
        if where == spot:
            x.mul_(0.5)

    def scene(model: Any, trace: Callable[..., Any]) -> Iterator[Any]:
        for writes in (True, True, True, False, True):
            model.met_by(meet if writes else lambda *_: None)
            with torch.no_grad():
                yield trace(model, X)

    play(Net, scene, math=False)


def in_a_thread(x: Tensor) -> None:
    """A write that torch counts and no function mode sees."""
    thread = threading.Thread(target=torch.no_grad()(lambda: x.mul_(-1)))
    thread.start()
    thread.join()


@pytest.mark.parametrize("spot", ["q scored", "k scored", "scaled masked", "masked masked", "q made"])
@pytest.mark.parametrize("seen_at", ["q used", "weights softmaxed", "out used", "q masked"])
def test_a_write_that_is_not_seen_before_a_run_turns_out_to_be_another(spot: str, seen_at: str) -> None:
    """What was written to before what ran is followed after all."""
    if spot == "masked masked" and seen_at != "q masked":
        pytest.xfail("scores that the model masks in place as well are taken for untouched")

    def scene(model: Any, trace: Callable[..., Any]) -> Iterator[Any]:
        for writes in (False, False, True, True, False):

            def meet(number: int, where: str, x: Tensor, writes: bool = writes) -> None:
                if number == 1 and where == spot and writes:
                    in_a_thread(x)
                if number == 1 and where == seen_at and writes:
                    x.sum()

            model.met_by(meet)
            with torch.no_grad():
                yield trace(model, X)

    play(Net, scene, math=False)


class InPlace(nn.Module):
    """As little memory as can be: all that can be done in place is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(3)])
        self.register_buffer("buffer", torch.zeros(B, H, T, T))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        for i, layer in enumerate(self.layers):
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            if i == 0:
                scores = torch.matmul(q, k.mT, out=self.buffer)
            else:
                scores = q @ k.mT
            scores.mul_(0.5).masked_fill_(hidden, -torch.inf)
            scores -= scores.amax(-1, keepdim=True)
            weights = scores.softmax(-1)
            weights = F.dropout(weights, 0.2, self.training, inplace=True)
            x += merge(weights @ v)
            q.zero_()
            v[:, 0] = 0
        return x


@pytest.mark.parametrize("train", [False, True])
def test_in_place_throughout(train: bool) -> None:
    def scene(model: Any, trace: Callable[..., Any]) -> Iterator[Any]:
        for _ in range(4):
            with torch.no_grad():
                yield trace(model, X)

    play(lambda: InPlace().train(train), scene, math=False)


def test_the_input_and_the_residual_stream_are_written_to() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
                x += merge((q @ k.mT / 2).softmax(-1) @ v)
                x[:, 0].mul_(0.9)
            return x

    def scene(model: Any, trace: Callable[..., Any]) -> Iterator[Any]:
        for _ in range(4):
            x = X.clone()
            with torch.no_grad():
                found = trace(model, x)
            found.output = [found.output.clone(), x.clone()]
            yield found

    play(Stream, scene)


def test_one_buffer_for_the_outputs_of_all_layers() -> None:
    class Poured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            out = torch.zeros(3, B, H, T, D)
            for i, layer in enumerate(self.layers):
                q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
                for h in range(H):
                    out[i, :, h] = (q[:, h] @ k[:, h].mT / 2).softmax(-1) @ v[:, h]
                x = x + merge(out[i])
            return x

    def scene(model: Any, trace: Callable[..., Any]) -> Iterator[Any]:
        for _ in range(4):
            with torch.no_grad():
                yield trace(model, X)

    play(Poured, scene)


def test_keys_in_one_memory_with_what_is_written_only_later() -> None:
    """A hook of the second run writes to the memory in which the keys of another layer lie."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.layers = nn.Linear(E, E), nn.ModuleList([nn.Linear(E, E) for _ in range(3)])
            self.register_buffer("k", torch.zeros(3, B, H, T, D))
            self.at = -1

        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                self.k[i] = heads(layer(x), H)
            outs, scores = [], []
            for i in range(3):
                scores.append(heads(self.q(x), H) @ self.k[i].mT / 2)
                if i == 1 and self.at >= 0:
                    self.k[self.at].mul_(3)
            for i, one in enumerate(scores):
                outs.append(merge(one.softmax(-1) @ self.k[i]))
            return torch.stack(outs).sum(0)

    def scene(model: Any, trace: Callable[..., Any]) -> Iterator[Any]:
        for at in (-1, -1, 0, 1, 2, -1, 0):
            model.at = at
            with torch.no_grad():
                yield trace(model, X)

    play(Shared, scene, math=False)


# -------------------------------------------------------------------------------------------- what is kept


class Made(TorchDispatchMode):
    """The tensors that operations make, and how many bytes of them are there at once at most."""

    def __init__(self) -> None:
        super().__init__()
        self.there: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.there[id(x)] = weakref.ref(x), x.untyped_storage()._cdata, x.untyped_storage().nbytes()
        self.peak = max(self.peak, self.held())
        return out

    def held(self) -> int:
        """The bytes of all that is there still."""
        self.there = {key: one for key, one in self.there.items() if one[0]() is not None}
        return sum({storage: size for _, storage, size in self.there.values()}.values())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "options": lambda: Model({"rotary": True, "p": 0.1}, {"window": 2}, {"groups": 2}, {"rotary": True}),
    "weights again": WeightsAgain,
    "chunks": Chunked,
    "in place": InPlace,
}
LONG = draw(B, 40, E, seed=2)


@pytest.mark.parametrize("name", MODELS)
def test_no_more_memory_than_following_takes(name: str) -> None:
    """At the most that there is at once, by the tensors that a model makes."""

    def peaks(model: nn.Module, **options: Any) -> list[int]:
        found = []
        for _ in range(4):
            with torch.no_grad(), Made() as made:
                traced(model, X if name == "in place" else LONG, **options)
            found.append(made.peak)
        return found

    for options in ({}, {"capture": ("output",)}, {"layers": [0]}):
        torch.manual_seed(0)
        model = MODELS[name]()
        with without_recipes():
            expected = max(peaks(model, **options))
        found = peaks(model, **options)
        # What is needed of a run that may yet have to be followed is kept to its end.
        assert max(found[2:]) <= 1.05 * expected, (options, found, expected)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_kept_between_traces(name: str, grad: bool) -> None:
    """With the trace all tensors go, before any garbage collection."""
    if grad and name == "in place":
        return
    model = MODELS[name]()
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            traced(model, X)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            with torch.set_grad_enabled(grad), Made() as made:
                trace = traced(model, X)
                assert made.held()
                del trace
            if name == "in place":  # following what is done in place leaves some to it
                gc.collect()
            own = {id(x) for x in model.buffers()}
            made.held()
            left = [
                tuple(x.shape) for ref, _, _ in made.there.values() if (x := ref()) is not None and id(x) not in own
            ]
            assert not left
    finally:
        gc.enable()


@pytest.mark.parametrize("name", MODELS)
def test_what_was_learned_goes_with_the_model(name: str) -> None:
    model = MODELS[name]()
    for _ in range(3):
        with torch.no_grad():
            traced(model, X)
    kept = [weakref.ref(one) for one in (model, *model.modules(), *model.parameters(), *model.buffers())]
    assert steps_of(model)
    del model
    gc.collect()
    assert [ref() for ref in kept if ref() is not None] == []


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_was_learned_holds_no_tensor_and_no_module(name: str, grad: bool) -> None:
    """From what was learned none can be reached, by whatever path."""
    if grad and name == "in place":
        return
    model = MODELS[name]()
    for _ in range(3):
        with torch.set_grad_enabled(grad):
            traced(model, X)
    waiting: list[Any] = [recipes_of(model)]
    reached: dict[int, Any] = {}
    while waiting:
        one = waiting.pop()
        if id(one) in reached or isinstance(one, (type, ModuleType, weakref.ref)):
            continue
        reached[id(one)] = one
        if isinstance(one, Tensor) and not one.numel():  # stands where there was one
            continue
        assert not isinstance(one, (Tensor, nn.Module)), type(one)
        if not isinstance(one, (FunctionType, BuiltinFunctionType)):  # of which the globals are reached
            waiting += gc.get_referents(one)
        elif isinstance(one, FunctionType):
            waiting += [cell.cell_contents for cell in one.__closure__ or ()]
    assert len(reached) > 100


def test_a_model_is_copied_and_pickled_without_what_was_learned() -> None:
    model = plain()
    for _ in range(3):
        traced(model, X)
    fresh = plain()
    assert vars(model).keys() == vars(fresh).keys()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = recipes_of(other)
        assert found is not None and not found.steps
        alike(seen(traced(other, X)), seen(traced(model, X)), "a copy")


def steps_of(model: nn.Module) -> int:
    learned = recipes_of(model)
    assert learned is not None
    return learned.steps


def grows(model: nn.Module, run: Callable[[int], Any], times: int = 8, settled: int = 4) -> None:
    """Nothing is learned any more once all has been seen."""
    steps = []
    for i in range(times):
        run(i)
        steps.append(steps_of(model))
    assert steps[-1] == steps[settled], steps


def test_what_was_seen_is_not_learned_again(way: str) -> None:
    torch.manual_seed(0)
    model = Net()
    grows(model, lambda i: traced(model, X))


def test_modes_in_turn_are_learned_once(way: str) -> None:
    torch.manual_seed(0)
    model = Net()

    def run(i: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(i % 2)):
            traced(model, X)

    grows(model, run, 16, 8)


def test_errors_at_one_place_are_learned_once() -> None:
    torch.manual_seed(0)
    model = Net()

    def run(i: int) -> None:
        def fail(number: int, where: str, x: Tensor) -> None:
            if (number, where) == (1, "masked masked"):
                raise ValueError

        model.met_by(fail)
        with pytest.raises(ValueError):
            traced(model, X)
        model.met_by(lambda *_: None)
        traced(model, X)

    grows(model, run)


def test_other_lengths_in_turn_are_learned_once(way: str) -> None:
    torch.manual_seed(0)
    model = plain()
    grows(model, lambda i: [traced(model, X[:, :n]) for n in (1, 3, 5)], 6, 3)


def test_layers_left_out_at_random_are_learned_once() -> None:
    torch.manual_seed(0)
    model = Dropped({}, {"window": 2}, {}, {"rotary": True})

    def run(i: int) -> None:
        for seed in (0, 1, 2, 4, 5, 6):  # with some layers left
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                hookattn.trace(model, X)

    grows(model, run, 5, 2)


@pytest.mark.parametrize("limit", [0, 1, 30, 100])
def test_recipes_that_outgrow_their_bound(way: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recipes, "LIMIT", limit)
    model: Any = None

    def scene(new: Any, trace: Callable[..., Any]) -> Iterator[Any]:
        nonlocal model
        model = new
        for n in (5, 3, 5, 5, 2, 4, 5, 1, 5, 5):
            yield trace(new, X[:, :n])
            if trace is traced:
                assert steps_of(new) <= limit + 300  # of one forward more

    play(plain, scene)


def test_a_generation_outgrows_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is forgotten while a trace runs, what it records is right."""
    monkeypatch.setattr(Recipes, "LIMIT", 80)
    torch.manual_seed(0)
    model = Cached()

    def generate() -> Any:
        with hookattn.tracing(model) as trace, torch.no_grad():
            x, past, outs = X[:, :2], None, []
            for _ in range(12):
                y, past = model(x, past)
                outs.append(y)
                x = y[:, -1:]
            trace.output = outs
        return seen(trace)

    with without_recipes():
        expected = generate()
    for i in range(3):
        alike(generate(), expected, f"generation {i}")
        assert steps_of(model) <= 80 + 100


def test_a_constant_that_is_another_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that is annealed: each run has a branch of its own, and their number is bounded."""
    monkeypatch.setattr(Recipes, "LIMIT", 200)

    class Annealed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.scale = nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(2)]), 1.0

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.qkv:
                q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
                x = x + merge((q @ k.mT * self.scale).softmax(-1) @ v)
            return x

    def scene(model: Any, trace: Callable[..., Any]) -> Iterator[Any]:
        for i in range(20):
            model.scale = 1.0 / (i + 1)
            yield trace(model, X)
            if trace is traced:
                assert steps_of(model) <= 200 + 60

    play(Annealed, scene)
