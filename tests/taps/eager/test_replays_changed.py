"""Models that change between two traces, raise in the middle of one, or decide by values: never a wrong record."""

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
from hookattn.models.registry import using
from hookattn.taps.eager.assemble import CallBuilder
from hookattn.taps.eager.correspondence import Correspondence
from hookattn.taps.eager.learning import Lesson
from hookattn.taps.eager.recogniser import Recogniser
from hookattn.taps.eager.replay import Run
from tests.beside import checked_replays
from tests.hands import Attention, B, Cached, D, E, H, InOneModule, Model, plain, rotated
from tests.reference import draw, heads, merge, same_bits
from tests.replayed import alike, play, seen, traced, without_recipes

T = 5
X = draw(B, T, E, seed=1)
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires", "ignore:The given NumPy array")


class Ours(hookattn.Adapter):
    name, covers = "replays", ("tests.hands", __name__)
    attention = {"Attention": "self", "Modular": "self", "Decided": "self"}


@pytest.fixture(params=["whole", "sites"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Whether a model is watched as a whole, or at the sites that an adapter names alone."""
    with using(*([Ours()] if request.param == "sites" else [])):
        yield request.param


class Pass(nn.Module):
    """Stands where somebody may hook."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Modular(nn.Module):
    """An attention whose every step is a module that may be hooked or exchanged."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.heads = H
        self.q, self.k, self.v, self.out = (nn.Linear(E, E) for _ in range(4))
        self.scores, self.softmax, self.dropout, self.merged = Pass(), nn.Softmax(-1), nn.Dropout(p), Pass()
        self.hides = True

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(one(x), self.heads) for one in (self.q, self.k, self.v))
        scores = self.scores(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))
        if self.hides:
            t = x.shape[1]
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -math.inf)
        weights = self.dropout(self.softmax(scores))
        return self.out(self.merged(merge(weights @ v)))


class Net(nn.Module):
    """Three of them."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Modular(p) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


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

    play(lambda: Net(0.2).train(), scene, math=False)


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

    play(Net, scene, math=False)


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

    play(Net, scene)


def test_a_copy_of_a_model_goes_its_own_way() -> None:
    torch.manual_seed(0)
    model = Net()
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

    play(Net, scene)


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

    play(Net, scene)


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
    inner, outer = InOneModule(2), Net()
    outer.layers.append(inner)
    with without_recipes():
        expected = seen(traced(outer, X)), seen(traced(inner, X))
    for i in range(3):
        alike(seen(traced(inner, X)), expected[1], f"inner {i}")
        alike(seen(traced(outer, X)), expected[0], f"outer {i}")
        with hookattn.tracing(outer) as trace:
            Net()(X)  # somebody else's
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

    play(Net, scene)


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
    model = Net()
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
