"""What a model decides by values, and what a user does between forwards: recipes decide nothing by values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn.models.registry import using
from tests.beside import checked_replays
from tests.hands import Attention, B, Cached, D, E, H, InOneModule, Model, ModularNet, plain, rotated
from tests.reference import draw, heads, merge, same_bits
from tests.replayed import alike, play, seen, traced, without_recipes

T = 5
X = draw(B, T, E, seed=1)
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires", "ignore:The given NumPy array")


class Ours(hookattn.Adapter):
    name, covers = "replays", ("tests.hands", __name__)
    attention = {"Attention": "self", "Modular": "self", "Decided": "self"}


# ---------------------------------------------------------------------------------- what is told by values


class Decided(nn.Module):
    """Layers whose scores get something that is a mask, a bias or nothing, by its values."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layers = how, nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(3)])

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            weights = getattr(self, self.how)(q @ k.mT / 2, given).softmax(-1).nan_to_num()
            x = x + merge(weights @ v)
        return x

    def added(self, scores: Tensor, given: Tensor) -> Tensor:
        return scores + given

    def added_in_place(self, scores: Tensor, given: Tensor) -> Tensor:
        scores += given
        return scores

    def doubly(self, scores: Tensor, given: Tensor) -> Tensor:
        return scores + (given + torch.ones(T, T).triu(1) * -1e9)

    def filled(self, scores: Tensor, given: Tensor) -> Tensor:
        return scores.masked_fill(given < -1, -math.inf)

    def where(self, scores: Tensor, given: Tensor) -> Tensor:
        return torch.where(given < -1, torch.tensor(-1e4), scores)

    def where_of(self, scores: Tensor, given: Tensor) -> Tensor:
        return scores.where(given > -1, given)

    def old_gpt2(self, scores: Tensor, given: Tensor) -> Tensor:
        mask = (given > -1).float()
        return scores * mask - 1e4 * (1 - mask)

    def multiplied(self, scores: Tensor, given: Tensor) -> Tensor:
        return scores * given.exp()

    def floored(self, scores: Tensor, given: Tensor) -> Tensor:
        return torch.max(scores + given, torch.tensor(torch.finfo(torch.float32).min))


def penalty(kind: str) -> Tensor:
    hidden = torch.ones(T, T).triu(1).bool()
    return {
        "causal": torch.zeros(T, T).masked_fill(hidden, -math.inf),
        "large": torch.zeros(T, T).masked_fill(hidden, -1e9),
        "bias": draw(T, T, seed=5, std=0.5),
        "both": draw(T, T, seed=5, std=0.5).masked_fill(hidden, -math.inf),
        "zeros": torch.zeros(T, T),
        "nothing left": torch.full((T, T), -math.inf),
        "one row hidden": torch.zeros(T, T).index_fill(0, torch.tensor([2]), -math.inf),
        "one key hidden": torch.zeros(T, T).index_fill(1, torch.tensor([3]), torch.finfo(torch.float32).min),
    }[kind]


KINDS = ("causal", "large", "bias", "both", "zeros", "nothing left", "one row hidden", "one key hidden")
HOWS = ("added", "added_in_place", "doubly", "filled", "where", "where_of", "old_gpt2", "multiplied", "floored")


@pytest.mark.parametrize("how", HOWS)
def test_what_is_a_mask_in_one_run_and_a_bias_in_the_next(way: str, how: str) -> None:
    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for kind in (*KINDS, *reversed(KINDS), "causal", "bias", "causal"):
            if how in ("multiplied", "where_of") and kind == "nothing left":
                continue
            yield trace(model, (X, penalty(kind)))

    with torch.no_grad():
        play(lambda: Decided(how), scene, math=False)


def test_a_buffer_that_is_written_to_between_layers() -> None:
    """One mask object in all layers, with other values from the second layer on; then in the other order."""

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        given = penalty("causal")
        for first, then in (("causal", "causal"), ("causal", "bias"), ("bias", "causal"), ("zeros", "causal")) * 2:
            given.copy_(penalty(first))

            def write(*_: Any, then: str = then) -> None:
                given.copy_(penalty(then))

            hook = model.layers[1].register_forward_pre_hook(write)
            yield trace(model, (X, given))
            hook.remove()

    with torch.no_grad():
        play(lambda: Decided("added"), scene, math=False)


class Scaled(nn.Module):
    """A scale that is a tensor, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layers = how, nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(3)])
        self.scale, self.each = nn.Parameter(torch.tensor(0.5)), nn.Parameter(draw(H, 1, 1, seed=3).exp())
        self.register_buffer("factor", torch.tensor(0.5))

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            if self.how == "cosine":
                q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            scores = q @ k.mT
            if self.how == "parameter":
                scores = scores * self.scale
            elif self.how == "buffer":
                scores = self.factor * scores
            elif self.how == "given":
                scores = scores / given
            elif self.how == "item":
                scores = scores * given.item()
            elif self.how == "made":
                scores = scores / torch.sqrt(torch.tensor(float(k.shape[-1])))
            elif self.how == "of two":
                scores = scores * (self.scale / given)
            else:
                scores = scores * self.each.clamp(max=2.0)
            x = x + merge(scores.softmax(-1) @ v)
        return x


@pytest.mark.parametrize("how", ["parameter", "buffer", "given", "item", "made", "of two", "each head", "cosine"])
def test_a_scale_that_is_a_tensor_and_changes(how: str) -> None:
    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for value in (2.0, 2.0, 0.25, 1.0, 3.0, 0.0 if how in ("parameter", "buffer", "item") else 5.0, 2.0):
            with torch.no_grad():
                model.scale.fill_(value)
                model.factor.fill_(value)
                model.each.mul_(value or 1.0)
            with torch.no_grad():
                yield trace(model, (X, torch.tensor(value)))

    play(lambda: Scaled(how), scene)


def test_the_same_operations_of_other_tensors() -> None:
    """Only which tensor goes where tells these forwards apart."""

    class Wired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps, self.wires = nn.ModuleList([nn.Linear(E, E) for _ in range(3)]), (0, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            made = [heads(one(x), H) for one in self.maps]
            for _ in range(2):
                q, k, v = (made[i] for i in self.wires)
                x = x + merge((q @ k.mT / 2).softmax(-1) @ v)
            return x

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for wires in (
            (0, 1, 2),
            (0, 1, 2),
            (1, 0, 2),
            (0, 1, 1),
            (0, 0, 2),
            (2, 1, 0),
            (0, 0, 0),
            (0, 1, 2),
            (1, 0, 2),
        ):
            model.wires = wires
            yield trace(model, X)

    play(Wired, scene)


@pytest.mark.parametrize("flag", [1, 1.0, True, 2, -1])
def test_constants_that_are_equal_and_of_other_types(flag: float) -> None:
    """1, 1.0 and True are the same to ``==``, and 0.0 and -0.0 are."""

    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.value = nn.Linear(E, 3 * E), 1.0

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (heads(one, H) for one in self.qkv(x).chunk(3, -1))
            return merge((q @ k.mT * self.value + (self.value - self.value)).softmax(-1) @ v)

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for value in (1.0, flag, 1, 1.0, flag):
            model.value = value
            yield trace(model, X)

    play(Flagged, scene, math=False)


# ------------------------------------------------------------------------------------- a user's own doings


def test_what_a_user_does_between_forwards_of_a_block() -> None:
    """Operations of the user's own stand between those of the model; tensors of one forward go into the next."""
    torch.manual_seed(0)
    model = Cached()

    def block(mine: bool) -> Any:
        with hookattn.tracing(model) as trace:
            y, past = model(X)
            if mine:
                past = [(k * 1.0, v.clone()) for k, v in past]
                y = y.softmax(-1) @ y.mT @ y
            out, _ = model(y[:, -1:], past)
            model(X)
            trace.output = out
        return seen(trace)

    with torch.no_grad():
        with without_recipes():
            expected = {mine: block(mine) for mine in (False, True)}
        for mine in (False, False, True, True, False, True):
            alike(block(mine), expected[mine], f"mine: {mine}")
        with checked_replays():
            for mine in (False, True, False, True):
                alike(block(mine), expected[mine], f"mine, checked: {mine}")


def test_parts_of_a_model_alone_and_within() -> None:
    torch.manual_seed(0)
    model = plain()

    def block() -> Any:
        with hookattn.tracing(model) as trace:
            model.layers[1](X)
            model(X)
            model.layers[1].attention(X)
            model.layers[2](X[:, :3])
            trace.output = model(X)
        return seen(trace)

    with without_recipes():
        expected = block()
    for i in range(3):
        alike(block(), expected, f"block {i}")
        with checked_replays():
            alike(block(), expected, f"checked block {i}")


def test_layers_of_two_models_in_one_trace() -> None:
    """Another model, that was traced before, runs within one that is traced."""
    torch.manual_seed(0)
    inner, outer = InOneModule(2), ModularNet()
    outer.layers.append(inner)
    with without_recipes():
        expected = seen(traced(outer, X)), seen(traced(inner, X))
    for i in range(3):
        alike(seen(traced(inner, X)), expected[1], f"inner {i}")
        alike(seen(traced(outer, X)), expected[0], f"outer {i}")
        with hookattn.tracing(outer) as trace:
            ModularNet()(X)  # somebody else's
            out = outer(X)
        assert same_bits(out, expected[0].output) and len(trace) == len(expected[0].told)


def test_layers_that_are_rebuilt_for_every_forward() -> None:
    """Functional models: modules and parameters are new in every run, and memory is used again."""

    class Rebuilt(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for i in range(3):
                layer = Attention(rotary=i == 1)
                for j, p in enumerate(layer.parameters()):
                    p.data.copy_(draw(*p.shape, seed=10 * i + j, std=0.3))
                x = x + layer(x)
            return x

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for _ in range(4):
            with torch.no_grad():
                yield trace(model, X)

    play(Rebuilt, scene)


def test_layers_that_take_turns(way: str) -> None:
    """A flag of each layer changes with every run, so that no two runs in a row are alike."""

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for i in range(8):
            for j, layer in enumerate(model.layers):
                layer.attention.window = 2 if (i >> j) & 1 else None
                layer.attention.rotary = (i + j) % 3 == 0
            yield trace(model, X)

    play(lambda: Model({}, {}, {}), scene)


def test_hooks_that_hold_on_to_tensors(way: str) -> None:
    """What one run keeps of its tensors, and goes on with in the next."""
    held: list[Tensor] = []

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        held.clear()

        def mixed(module: Any, args: Any, out: Tensor) -> Tensor:
            held.append(out)
            return out if len(held) < 2 else (out + held[-2]) / 2

        model.layers[1].q.register_forward_hook(mixed)
        for _ in range(4):
            with torch.no_grad():
                yield trace(model, X)

    play(ModularNet, scene)


@pytest.mark.xfail(reason="with a second follower beside, one call of two that were joined is missed; alone it is not")
def test_weights_that_one_run_hands_to_the_next() -> None:
    """Half of the weights are those of the run before."""

    class Momentum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.before = nn.Linear(E, 3 * E), None

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (heads(one, H) for one in self.qkv(x).chunk(3, -1))
            weights = (q @ k.mT / 2).softmax(-1)
            if self.before is not None:
                weights = (weights + self.before) / 2
            self.before = weights
            return merge(weights @ v)

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for n in (1, 2, 1, 3):
            if trace is not traced:
                yield type("Untraced", (), {"output": [model(X) for _ in range(n)]})
                continue
            with hookattn.tracing(model) as running:
                running.output = [model(X) for _ in range(n)]
            yield running

    with torch.no_grad():
        play(Momentum, scene, math=False)


def test_rotated_outside_of_the_sites() -> None:
    """Tensors that are made outside of a site go into it: tables, masks, and what the layer before gave."""

    class Site(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(E, 3 * E)

        def forward(self, x: Tensor, table: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            q, k, v = (heads(one, H) for one in self.qkv(x).chunk(3, -1))
            scores = (rotated(q) * table) @ (rotated(k) * table).mT / 2
            weights = (scores if mask is None else scores + mask).softmax(-1)
            return merge(weights @ v), weights

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sites = nn.ModuleList([Site() for _ in range(4)])

        def forward(self, x: Tensor, hides: bool) -> Tensor:
            table = torch.linspace(0.5, 1.5, D)
            mask = penalty("causal") if hides else None
            for i, site in enumerate(self.sites):
                out, weights = site(x, table if i % 2 else table[None], mask if i else None)
                x = x + out + weights.mean(1) @ x
            return x

    class Sites(hookattn.Adapter):
        name, covers = "sites", (__name__,)
        attention = {"Site": "self"}

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for hides in (True, True, False, True, False):
            yield trace(model, (X, hides))

    for adapters in ([], [Sites()]):
        with using(*adapters):
            play(Outer, scene)
