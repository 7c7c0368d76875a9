"""Models that change between two traces or raise in the middle of one, and faults of our own: never a wrong record."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn.taps.eager.assemble import CallBuilder
from hookattn.taps.eager.correspondence import Correspondence
from hookattn.taps.eager.learning import Lesson
from hookattn.taps.eager.recogniser import Recogniser
from hookattn.taps.eager.replay import Run
from tests.hands import B, D, E, H, Modular, ModularNet
from tests.reference import draw, heads, merge, same_bits
from tests.replayed import alike, play, seen, traced, without_recipes

T = 5
X = draw(B, T, E, seed=1)
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires", "ignore:The given NumPy array")


class Ours(hookattn.Adapter):
    name, covers = "replays", ("tests.hands", __name__)
    attention = {"Attention": "self", "Modular": "self", "Decided": "self"}


# --------------------------------------------------------------------------------- what changes between runs

Change = Callable[[Any], Callable[[], Any] | None]


def hooked(path: str, hook: Callable[[Tensor], Any]) -> Change:
    """A forward hook on a part, which gets what the part gives."""

    def change(model: Any) -> Callable[[], Any]:
        handle = model.get_submodule(path).register_forward_hook(lambda module, args, out: hook(out))
        return handle.remove

    return change


def exchanged(path: str, module: Callable[[], nn.Module]) -> Change:
    """Another module in the place of one."""

    def change(model: Any) -> Callable[[], Any]:
        before = model.get_submodule(path)
        model.set_submodule(path, module())
        return lambda: model.set_submodule(path, before)

    return change


def put(path: str, name: str, value: Any) -> Change:
    """Another value of an attribute."""

    def change(model: Any) -> Callable[[], Any]:
        module = model.get_submodule(path)
        before = getattr(module, name)
        setattr(module, name, value)
        return lambda: setattr(module, name, before)

    return change


def new_forward(path: str, forward: Callable[[Any, Tensor], Tensor]) -> Change:
    """Another forward, on the module alone."""

    def change(model: Any) -> Callable[[], Any]:
        module = model.get_submodule(path)
        module.forward = lambda x: forward(module, x)
        return lambda: delattr(module, "forward")

    return change


def _parts(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(heads(one(x), self.heads) for one in (self.q, self.k, self.v))


def scaled_twice(self: Any, x: Tensor) -> Tensor:
    q, k, v = _parts(self, x)
    weights = self.softmax(self.scores(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) * 2.0))
    return self.out(merge(weights @ v))


def keys_first(self: Any, x: Tensor) -> Tensor:
    q, k, v = _parts(self, x)
    return self.out(merge((k @ q.mT / 2).softmax(-2).transpose(-2, -1) @ v))


def keys_are_values(self: Any, x: Tensor) -> Tensor:
    q, k, _ = _parts(self, x)
    return self.out(merge((q @ k.mT / 2).softmax(-1) @ k))


def linear_attention(self: Any, x: Tensor) -> Tensor:
    q, k, v = _parts(self, x)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return self.out(merge(q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT)))


def fused(self: Any, x: Tensor) -> Tensor:
    return self.out(merge(F.scaled_dot_product_attention(*_parts(self, x), is_causal=True)))


def swapped(self: Any, x: Tensor) -> Tensor:
    """The same operations, but that queries and keys change places."""
    k, q, v = _parts(self, x)
    scores = self.scores(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    return self.out(self.merged(merge(self.dropout(self.softmax(scores)) @ v)))


def numpy_doubled(x: Tensor) -> Tensor:
    """What no torch operation makes."""
    return torch.from_numpy(x.detach().numpy() * 2)


def in_numpy(x: Tensor) -> None:
    array = x.detach().numpy()
    array *= 0.5


def resized(model: Any) -> Callable[[], None]:
    """Keys and queries are wider."""
    layer = model.layers[1]
    before = [(one, one.weight, one.bias) for one in (layer.q, layer.k)]
    for one in (layer.q, layer.k):
        one.weight, one.bias = nn.Parameter(draw(2 * E, E, seed=3)), nn.Parameter(draw(2 * E, seed=4))

    def back() -> None:
        for one, weight, bias in before:
            one.weight, one.bias = weight, bias

    return back


def new_data(model: Any) -> None:
    for p in model.layers[1].parameters():
        p.data = p.data.flip(0).clone()


def transposed_data(model: Any) -> None:
    """Parameters of other strides, which nothing depends on."""
    for name in "qkv":
        weight = getattr(model.layers[1], name).weight
        weight.data = weight.data.t().contiguous().t()


def filled_data(model: Any) -> None:
    with torch.no_grad():
        for p in model.layers[1].parameters():
            p.mul_(1.5)


def tied(model: Any) -> Callable[[], None]:
    """Queries and keys are made by one layer, and were made by two."""
    layer = model.layers[1]
    before, layer.q = layer.q, layer.k
    return lambda: setattr(layer, "q", before)


def tied_weights(model: Any) -> Callable[[], None]:
    layer = model.layers[1]
    before, layer.q.weight = layer.q.weight, layer.k.weight
    return lambda: setattr(layer.q, "weight", before)


def of_another_class(model: Any) -> Callable[[], None]:
    class Other(Modular):
        def forward(self, x: Tensor) -> Tensor:
            return scaled_twice(self, x)

    model.layers[1].__class__ = Other
    return lambda: setattr(model.layers[1], "__class__", Modular)


def class_forward(model: Any) -> Callable[[], None]:
    before = Modular.forward
    Modular.forward = scaled_twice  # type: ignore[method-assign]
    return lambda: setattr(Modular, "forward", before)


def reversed_layers(model: Any) -> Callable[[], None]:
    before = model.layers
    model.layers = nn.ModuleList(reversed(list(before)))
    return lambda: setattr(model, "layers", before)


def one_more(model: Any) -> Callable[[], None]:
    model.layers.append(Modular())
    return lambda: model.layers.pop(-1)


def one_less(model: Any) -> Callable[[], None]:
    before = model.layers[2]
    del model.layers[2]
    return lambda: model.layers.append(before)


def quiet(model: Any) -> Callable[[], None]:
    model.requires_grad_(False)
    return lambda: model.requires_grad_(True)


def doubled_softmax(model: Any) -> Callable[[], None]:
    before = nn.Softmax.forward
    nn.Softmax.forward = lambda self, x: F.softmax(x * 2, dim=self.dim)  # type: ignore[method-assign]
    return lambda: setattr(nn.Softmax, "forward", before)


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(E, 2, bias=False), nn.Linear(2, E, bias=False)
        self.base = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * 2


CHANGES: dict[str, Change] = {
    "hook: q doubled": hooked("layers.1.q", lambda q: q * 2),
    "hook: q doubled in place": hooked("layers.1.q", lambda q: q.mul_(2) if not q.requires_grad else q * 2),
    "hook: q doubled in numpy": hooked("layers.1.q", numpy_doubled),
    "hook: q written to in numpy": hooked("layers.1.q", in_numpy),
    "hook: q moved by a head": hooked("layers.1.q", lambda q: q.roll(D, -1)),
    "hook: q is a clone": hooked("layers.1.q", lambda q: q.clone()),
    "hook: q is k of another layer": hooked("layers.1.q", lambda q: q.flip(0)),
    "hook: scores doubled": hooked("layers.1.scores", lambda s: s * 2),
    "hook: scores with a bias": hooked("layers.1.scores", lambda s: s + torch.arange(T).float()),
    "hook: scores in numpy": hooked("layers.1.scores", numpy_doubled),
    "hook: scores capped": hooked("layers.1.scores", lambda s: 3 * torch.tanh(s / 3)),
    "hook: weights of two heads": hooked("layers.1.softmax", lambda w: (w + w.flip(1)) / 2),
    "hook: weights in numpy": hooked("layers.1.softmax", numpy_doubled),
    "hook: a head is ablated": hooked("layers.1.merged", lambda x: x * (torch.arange(E) >= D)),
    "hook: operations that come to nothing": hooked("layers.1.scores", lambda s: s.softmax(-1).sum() and None),
    "hook: looks at values": hooked("layers.1.softmax", lambda w: float(w.max()) and None),
    "forward: scaled twice": new_forward("layers.1", scaled_twice),
    "forward: keys first": new_forward("layers.1", keys_first),
    "forward: keys are values": new_forward("layers.1", keys_are_values),
    "forward: linear attention": new_forward("layers.1", linear_attention),
    "forward: fused": new_forward("layers.1", fused),
    "forward: q and k change places": new_forward("layers.1", swapped),
    "softmax: sigmoid": exchanged("layers.1.softmax", nn.Sigmoid),
    "softmax: over queries": exchanged("layers.1.softmax", lambda: nn.Softmax(-2)),
    "softmax: none": exchanged("layers.1.softmax", nn.Identity),
    "softmax: of everything": doubled_softmax,
    "dropout: none": exchanged("layers.1.dropout", nn.Identity),
    "dropout: more": put("layers.1.dropout", "p", 0.5),
    "dropout: in place": put("layers.1.dropout", "inplace", True),
    "q without bias": exchanged("layers.1.q", lambda: nn.Linear(E, E, bias=False)),
    "q with LoRA": exchanged("layers.1.q", Lora),
    "q is k": tied,
    "q has the weight of k": tied_weights,
    "flag": put("layers.1", "hides", False),
    "heads": put("layers.1", "heads", 2),
    "one head": put("layers.1", "heads", 1),
    "wider keys": resized,
    "new data": new_data,
    "new data of other strides": transposed_data,
    "other values": filled_data,
    "class": of_another_class,
    "forward of the class": class_forward,
    "layers in another order": reversed_layers,
    "one layer more": one_more,
    "one layer less": one_less,
    "eval": lambda model: (model.eval(), model.train)[1],
    "no gradients": quiet,
    "double": lambda model: (model.double(), model.float)[1],
    "half": lambda model: (model.half(), model.float)[1],
}


@pytest.mark.parametrize(
    ("way", "name"),
    [(way, name) for name in CHANGES for way in ("whole", "sites")[: 1 + (":" in name)]],
    indirect=["way"],
)
def test_a_model_that_changes(way: str, name: str) -> None:
    """As it was, twice changed, and as it was before."""

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        def one() -> Any:
            with torch.set_grad_enabled(name in ("no gradients", "double")):
                return trace(model, X.to(model.layers[0].q.weight.dtype))

        yield one()
        back = CHANGES[name](model)
        try:
            yield one()
            yield one()
        finally:
            if back is not None:
                back()
        yield one()

    play(lambda: ModularNet(0.2).train(), scene, math=False)


@pytest.mark.parametrize("name", ["hook: q doubled", "forward: keys first", "softmax: sigmoid", "heads", "q is k"])
def test_a_model_that_changes_in_a_block(name: str) -> None:
    """Between two forwards of one trace, to and fro."""

    def outputs(model: Any) -> list[Tensor]:
        found = []
        for _ in range(3):
            found += [model(X), model(X)]
            back = CHANGES[name](model)
            found += [model(X), model(X)]
            assert back is not None
            back()
        return found

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for _ in range(2):
            if trace is not traced:
                yield type("Untraced", (), {"output": outputs(model)})
                continue
            with hookattn.tracing(model) as running:
                running.output = outputs(model)
            yield running

    play(ModularNet, scene, math=False)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "not contiguous": lambda: draw(T, B, E, seed=1).transpose(0, 1),
    "every second": lambda: draw(B, 2 * T, E, seed=1)[:, ::2],
    "expanded": lambda: draw(1, T, E, seed=1).expand(B, T, E),
    "a parameter": lambda: nn.Parameter(X.clone()),
    "with a gradient": lambda: X.clone().requires_grad_(),
    "a result of an operation": lambda: X * 1,
    "one example": lambda: X[:1],
    "batch and length changed": lambda: draw(T, B, E, seed=1),
    "more": lambda: draw(3, 8, E, seed=1),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_another_kind(way: str, name: str) -> None:
    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for x in (X, X, INPUTS[name](), INPUTS[name](), X, INPUTS[name]()):
            yield trace(model, x)

    play(ModularNet, scene)


def test_a_copy_of_a_model_goes_its_own_way() -> None:
    torch.manual_seed(0)
    model = ModularNet()
    for _ in range(2):
        hookattn.trace(model, X)
    other = copy.deepcopy(model)
    other.layers[1].forward = lambda x: keys_first(other.layers[1], x)
    with without_recipes():
        expected = [seen(traced(one, X)) for one in (model, other)]
    for _ in range(3):
        for one, want in zip((model, other), expected, strict=True):
            alike(seen(traced(one, X)), want, "copy")


# ---------------------------------------------------------------------------------------------- that raise


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("spot", ["layers.1", "layers.1.k", "layers.1.scores", "layers.1.softmax", "layers.2.out"])
def test_a_model_that_raises_in_the_middle(way: str, spot: str, error: type[BaseException]) -> None:
    """It works again, in another trace and in the same."""

    def fail(*_: Any) -> None:
        raise error("half-way")

    def failing(model: Any) -> None:
        handle = model.get_submodule(spot).register_forward_hook(fail)
        try:
            with pytest.raises(error, match="half-way"):
                model(X)
        finally:
            handle.remove()

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        yield trace(model, X)
        for _ in range(3):
            if trace is traced:
                with pytest.raises(error), hookattn.tracing(model):
                    handle = model.get_submodule(spot).register_forward_hook(fail)
                    try:
                        model(X)
                    finally:
                        handle.remove()
            yield trace(model, X)
            if trace is not traced:
                yield type("Untraced", (), {"output": model(X)})
                continue
            with hookattn.tracing(model) as running:
                model(X)
                failing(model)
                running.output = model(X)
                failing(model)
            yield running

    play(ModularNet, scene)


class Falls(nn.Module):
    """Tries one way, and where that raises another: by values that an operation refuses, or as memory is full."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(3)])
        self.full = False

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
            try:
                scores = q @ k.mT / 2
                torch.linalg.cholesky(x[0].T @ x[0] + torch.eye(E))
                if self.full and i == 1:
                    raise RuntimeError("out of memory")
                out = scores.softmax(-1) @ v
            except RuntimeError:  # LinAlgError is one
                out = torch.cat(
                    [(q[:, h] @ k[:, h].mT / 2).softmax(-1)[:, None] @ v[:, h : h + 1] for h in range(H)], 1
                )
            x = x + merge(out)
        return x


def test_a_model_that_catches_its_own_errors() -> None:
    bad = X.clone()
    bad[0, 0, 0] = torch.nan

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for full in (False, False, True, True, False, True):
            model.full = full
            yield trace(model, X)
        model.full = False
        for x in (bad, X, bad, X):
            yield trace(model, x)

    play(Falls, scene, math=False)


def test_an_operation_that_raises_where_it_did_not() -> None:
    """The same operation on the same shapes: an index that is out of range in one run."""

    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.qkv = nn.Embedding(6, E), nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(2)])

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids[:, :T])
            for layer in self.qkv:
                q, k, v = (heads(one, H) for one in layer(x).chunk(3, -1))
                x = x + merge((q @ k.mT / 2).softmax(-1) @ v)
                x = x + self.table(ids[:, T:])
            return x

    good, bad = torch.arange(10)[None] % 6, torch.arange(10)[None] % 6
    bad[0, 7] = 99

    def scene(model: Any, trace: Any) -> Iterator[Any]:
        for _ in range(3):
            yield trace(model, good)
            with pytest.raises(IndexError):
                trace(model, bad)

    play(Looked, scene)


def test_a_part_on_the_meta_device(way: str) -> None:
    def scene(model: Any, trace: Any) -> Iterator[Any]:
        yield trace(model, X)
        yield trace(model, X)
        kept = model.layers[1].q
        model.layers[1].q = copy.deepcopy(kept).to("meta")
        with pytest.raises((RuntimeError, NotImplementedError, hookattn.HookattnError)):
            trace(model, X)
        model.layers[1].q = kept
        yield trace(model, X)

    play(ModularNet, scene)


# ------------------------------------------------------------------------------------------ faults of our own

FAULTS = [
    *((Run, name) for name in ("meets", "expect", "advance", "ingredients", "is_clear", "finish", "past", "recall")),
    *((Lesson, name) for name in ("describe", "append", "seen", "effects", "close", "give_up")),
    *((Recogniser, name) for name in ("_restore", "_happens")),
    (CallBuilder, "call"),
    (Correspondence, "meets"),
]


@pytest.mark.parametrize("at", [1, 7])
@pytest.mark.parametrize(("owner", "name"), FAULTS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_fault_in_recognising_is_none_of_the_model(
    way: str, owner: Any, name: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever breaks, the model runs each operation once and goes on, and what is recorded is right."""
    torch.manual_seed(0)
    model = ModularNet()
    model.layers[1].q.register_forward_hook(lambda module, args, out: out.mul_(2))
    other = X[:, :3]
    with torch.no_grad():
        with without_recipes():
            expected = [seen(traced(model, x)) for x in (X, other)]
        before, count = getattr(owner, name), 0

        def broken(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise ZeroDivisionError("ours")
            return before(*args, **kwargs)

        for x in (X, other, X, X, other):
            count = 0
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, broken)
                mine = seen(traced(model, x))
            want = expected[0 if x is X else 1]
            assert same_bits(mine.output, want.output)
            for told, tensors in zip(mine.told, mine.tensors, strict=True):
                like = next(i for i, one in enumerate(want.told) if one["path"] == told["path"])
                for key in (
                    "weights",
                    "v",
                    "output",
                ):  # of what it was made of, not all may have been seen: nor the axes
                    assert same_bits(*(one[key].flatten().sort()[0] for one in (tensors, want.tensors[like])))
            assert len(mine.told) == len(want.told) or mine.skipped
            alike(seen(traced(model, x)), want, "after it")
