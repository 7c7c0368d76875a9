"""``trace`` and ``tracing``: what goes in, what is kept of it, what a Trace answers, and what is said when it can't."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import inspect
import weakref
from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import hookattn
from hookattn import FieldNotCaptured, InputError, ModelError, NoAttentionError, SelectionError, api
from hookattn.recording.selection import Selection
from hookattn.testing import check_clean
from tests.reference import assert_untouched, draw, paths, same_bits, snapshot

B, T, E, H, G = 2, 6, 16, 4, 2
X = draw(B, T, E, seed=1)


class Attention(nn.Module):
    """Grouped heads through the fused kernel, causal unless there is something else to look at."""

    def __init__(self, heads: int = H, groups: int = G) -> None:
        super().__init__()
        self.n, self.out = (heads, 2 * groups), nn.Linear(E, E)
        self.q, self.kv = nn.Linear(E, E), nn.Linear(E, 2 * E // heads * groups)

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q, kv = (
            y.unflatten(-1, (n, -1)).transpose(1, 2)
            for y, n in zip((self.q(x), self.kv(x if memory is None else memory)), self.n, strict=True)
        )
        causal = memory is None and mask is None
        out = F.scaled_dot_product_attention(q, *kv.chunk(2, 1), attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, layers: int = 3, **sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(**sizes) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, mask=mask)
        return x


class Named(nn.Sequential):
    """Layers that stand in no list: how many there are is known only when the forward is over."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.final = Attention(), Attention(), Attention()


class TwoStacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.cross = Model(3), Model(2).layers, Model(2).layers

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.encoder(source)
        for own, cross in zip(self.decoder, self.cross, strict=True):
            target = cross(own(target), memory)
        return target


def model(kind: type[nn.Module] = Model, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(**arguments).eval()


def run(kind: type[nn.Module] = Model, **options: Any) -> hookattn.Trace:
    return hookattn.trace(model(kind), X, **options)


class Encoding(UserDict):  # type: ignore[type-arg]
    """As tokenizers return it: a mapping that is no dict, with the tokens at hand."""

    encodings = [SimpleNamespace(tokens=["[CLS]", "a", "b", "c", "d", "[SEP]"])] * B


@pytest.mark.parametrize("inputs", [X, (X,), (X, None), {"x": X}, {"x": X, "mask": None}, Encoding(x=X), UserDict(x=X)])
def test_every_kind_of_inputs(inputs: Any) -> None:
    m = model()
    trace = hookattn.trace(m, inputs)
    assert paths(trace.calls) == ["layers.0", "layers.1", "layers.2"] and same_bits(trace.output, m(X))
    assert trace.tokens == ([["[CLS]", "a", "b", "c", "d", "[SEP]"]] * B if isinstance(inputs, Encoding) else None)
    assert len(trace) == 3 and [c.index for c in trace] == [0, 1, 2] and trace.faithful
    assert "Model" in repr(trace) and "layers.1" in repr(trace[1]) and "H4" in repr(trace[1])
    assert same_bits(hookattn.trace(model(TakesList), list(X)).output, model(TakesList)(list(X)))  # one argument


class TakesList(Attention):
    def forward(self, xs: list[Tensor]) -> Tensor:
        return super().forward(torch.stack(xs))


def test_tokens() -> None:
    assert run(tokens=["a", "b"]).tokens == [["a", "b"]] and run(tokens=(("a",), ["b"])).tokens == [["a"], ["b"]]
    assert hookattn.trace(model(), Encoding(x=X), tokens=["mine"]).tokens == [["mine"]]
    for bad in ("abc", [1, 2], [["a", 1]], ["a", ["b"]], 7):
        with pytest.raises(InputError, match="list of strings"):
            run(tokens=bad)


MODELS: dict[str, tuple[type[Exception], Any, Any, str]] = {
    "no module": (ModelError, "gpt2", X, "nn.Module; got str 'gpt2'"),
    "no attention": (NoAttentionError, nn.Linear(E, E), X, r"no attention ran in Linear: .*compiled extension"),
    "meta": (ModelError, Model().to("meta"), X, r"layers\.0\.out\.weight is on the meta device.*load the weights"),
    "keyword": (InputError, Model(), {"y": X}, r"Model\.forward\(x.*missing.*'x'; got y=float32\[2, 6, 16\]"),
    "one too many": (InputError, Model(), {"x": X, "y": X}, r"unexpected keyword argument 'y'.*dict of keyword"),
    "missing": (InputError, Model(), (), "missing a required argument: 'x'; got nothing"),
    "text": (InputError, Model(), "hello", "'hello'.*tokenize"),
    "texts": (InputError, Model(), ["hello", "you"], "hold text.*tokenize"),
}


@pytest.mark.parametrize("name", MODELS)
def test_bad_models_and_inputs(name: str) -> None:
    kind, bad, inputs, message = MODELS[name]
    with pytest.raises(kind, match=message):
        hookattn.trace(bad, inputs)


class Renaming(Model):
    """Takes an old name of an argument, in a decorator; ``inspect`` shows the function inside it."""

    @functools.wraps(Model.forward)
    def forward(self, *args: Any, layers_of_x: Any = None, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs, **({} if layers_of_x is None else {"x": sum(layers_of_x)}))


def test_what_a_forward_takes_is_not_judged_by_its_signature() -> None:
    made = hookattn.trace(Renaming(), {"layers_of_x": [X / 2, X / 2]})  # lists are looked at for text before the run
    assert len(made) == len(run()) > 0


SELECTIONS: list[tuple[dict[str, Any], str]] = [
    ({"verify": "ful"}, "verify='ful': expected one of sample, full, off"),
    ({"capture": ("q", "attn")}, "no field 'attn'; choose among q, k, v"),
    ({"capture": 5}, "capture=5: expected a list of fields"),
    ({"capture": ()}, "capture is empty"),
    ({"layers": [0, 9]}, r"layers=\[0, 9\]: there is no layer 9; .* 2 \(main self"),
    ({"layers": -4}, "no layer -4"),
    ({"heads": [0, 4]}, r"heads=\[0, 4\]: \w+.* has 4 heads.* no head 4"),
    ({"heads": -5}, "no head -5"),
    ({"heads": slice(2)}, "expected an int or several ints"),
    ({"heads": True}, "heads=True"),
    ({"queries": [6]}, r"has 6 queries, so there is no query 6"),
    ({"queries": slice(9, None)}, "of which none is selected"),
    ({"queries": slice(0.5)}, "slice of ints"),
    ({"dtype": torch.int8}, "torch.float16"),
    ({"device": "gpu0"}, "device='gpu0': there is no such device here"),
]


@pytest.mark.parametrize("kind", [Model, Named])
@pytest.mark.parametrize(("options", "message"), SELECTIONS)
def test_bad_selections(kind: type[nn.Module], options: dict[str, Any], message: str) -> None:
    before = snapshot(m := model(kind))
    with pytest.raises(SelectionError, match=message):
        hookattn.trace(m, X, **options)
    assert_untouched(m, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_compiled_by_jit() -> None:
    traced = torch.jit.trace(Attention(), X)
    for bad in (torch.jit.script(nn.Sequential(nn.Linear(E, E))), traced):
        with pytest.raises(ModelError, match=r"torch\.jit.*trace the Python module"):
            hookattn.trace(bad, X)
    with pytest.warns(hookattn.SkippedWarning, match=r"compiled by torch\.jit"):
        assert [s.path for s in hookattn.trace(nn.Sequential(traced), X).skipped] == ["0"]
    assert len(hookattn.trace(nn.Sequential(torch.jit.script(nn.Linear(E, E)), Attention()), X)) == 1  # no harm there


def test_errors_of_the_block() -> None:
    """The model's own; no forward; one trace inside another, which leaves the outer one running."""
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        hookattn.trace(m := model(), X[..., :3])
    assert any("raised by the model" in note for note in caught.value.__notes__)
    with pytest.raises(NoAttentionError, match="never called"), hookattn.tracing(m):
        pass
    with hookattn.tracing(m) as outer:
        m(X)
        with pytest.raises(ModelError, match="already running in this thread; finish it"):
            hookattn.trace(model(), X)
        m(X)
    assert [c.step for c in outer] == [0, 0, 0, 1, 1, 1]
    assert_untouched(m)


# ------------------------------------------------------------------------------------------------ reading a trace


def test_getting_calls() -> None:
    trace = run()
    assert trace["layers.1"] is trace[1] is list(trace)[1] and trace[-1].site.layer == 2
    assert paths(trace[1:].calls) == ["layers.1", "layers.2"] and trace[1:].model == trace.model
    with pytest.raises(SelectionError, match=r"no call at 'layers\.7'; there are \['layers\.0'"):
        trace["layers.7"]
    with hookattn.tracing(m := model()) as twice:
        m(X)
        m(X[:, :3])
    with pytest.raises(SelectionError, match=r"ran 2 times, in steps \[0, 1\]; use trace.select\(path='layers\.0'"):
        twice["layers.0"]
    assert len(twice.select(path="layers.0")) == 2 and twice.select(step=-1, layer=0)[0].q.shape[2] == 3
    assert [len(step) for step in twice.attentions] == [3, 3]


def test_select() -> None:
    trace = hookattn.trace(model(TwoStacks), (X, X[:, :4]))
    assert len(trace) == len(trace.select(tap=trace[0].tap, step=0)) == 7
    assert paths(trace.select(stack="encoder").calls) == [f"encoder.layers.{i}" for i in range(3)]
    assert paths(trace.select(kind="cross", layer=-1).calls) == ["cross.1"]
    assert paths(trace.select(layer=-1).calls) == ["encoder.layers.2", "decoder.1", "cross.1"]
    assert paths(trace.select(layer=[0, -1], stack="decoder").calls) == ["decoder.0", "decoder.1"]
    with pytest.raises(SelectionError, match=r"no call fits \{'layer': 9, 'kind': 'cross'\}; there are layers \[0, 1"):
        trace.select(layer=9, kind="cross")
    with pytest.raises(SelectionError, match=r"stacks \['encoder', .*kinds \['self', 'cross'\], steps \[0\]"):
        trace.select(stack="vision")
    with pytest.raises(SelectionError, match=r"of which stack\?.*select\(stack='encoder', kind='self'\)"):
        _ = trace.attentions
    chosen = trace.select(stack="encoder").attentions
    assert len(chosen) == 3 and all(torch.equal(a, c.weights) for a, c in zip(chosen, trace, strict=False))


def test_a_field_that_was_not_captured() -> None:
    call = run(capture=("q", "weights"))[0]
    assert call.has("q") and not call.has("scores") and not hasattr(call, "k")
    for name in ("k", "v", "bias", "scores", "mask", "sinks", "output"):
        wanted = tuple(f for f in hookattn.FIELDS if f in ("q", "weights", name))
        with pytest.raises(FieldNotCaptured, match=rf"'{name}' of layers\.0 .*captured: q, weights") as caught:
            getattr(call, name)
        assert f"capture={wanted!r}" in str(caught.value)
        kept = run(capture=wanted)[0]
        assert kept.get(name) is None if name in ("bias", "sinks") else getattr(kept, name).dim() == 4


# ------------------------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("capture", [("q",), "v", ["weights"], ("q", "k", "bias", "mask", "sinks"), {"output", "mask"}])
def test_capture(capture: Any) -> None:
    full, trace = run(), run(capture=capture)
    names = {capture} if isinstance(capture, str) else set(capture)
    assert trace.faithful and all(set(c.captured) == names for c in trace)
    assert all(same_bits(a.get(name), b.get(name)) for a, b in zip(trace, full, strict=True) for name in names)
    if "sinks" in names:  # enough to derive the rest from
        assert torch.equal(trace[1].weights, full[1].weights) and torch.equal(trace[1].scores, full[1].scores)


@pytest.mark.parametrize("kind", [Model, Named])
def test_layers(kind: type[nn.Module]) -> None:
    full = run(kind=kind)
    for layers, expected in ((0, [0]), ([1], [1]), ([-1], [2]), ([0, -1], [0, 2]), (range(-3, -1), [0, 1])):
        trace = run(kind=kind, layers=layers)
        assert paths(trace.calls) == [paths(full.calls)[i] for i in expected]
        assert [c.index for c in trace] == list(range(len(expected))) and trace.faithful
        assert all(same_bits(a.weights, full[i].weights) for a, i in zip(trace, expected, strict=True))
    stacks = hookattn.trace(model(TwoStacks), (X, X[:, :4]), layers=[-1])  # of each stack its own last one
    assert paths(stacks.calls) == ["encoder.layers.2", "decoder.1", "cross.1"]


@pytest.mark.parametrize("heads", [2, [0], [3, 1], [0, 1, 3], [-1, 2], [0, 1, 2, 3], torch.tensor([1, 2])])
@pytest.mark.parametrize("queries", [None, 0, [5, 0], [-1], slice(-2, None), slice(None, None, -2)])
def test_heads_and_queries(heads: Any, queries: Any) -> None:
    """The rows of the full trace, whatever became of the groups; weights can be derived from what is left."""
    full, trace = run(), run(heads=heads, queries=queries, verify="full")
    h = torch.arange(H)[heads].view(-1).tolist()
    t = list(range(T))[queries] if isinstance(queries, slice) else torch.arange(T)[queries].view(-1).tolist()
    for call, whole in zip(trace, full, strict=True):
        assert call.heads == tuple(h) and call.queries == (None if queries is None else tuple(t))
        for name in ("q", "scores", "weights", "output"):
            assert torch.allclose(getattr(call, name), getattr(whole, name)[:, h][:, :, t], atol=1e-6), name
        groups = sorted({i // (H // G) for i in h})
        assert same_bits(call.k, whole.k[:, groups]) and same_bits(call.v, whole.v[:, groups])
        assert call.kv_heads == tuple(groups.index(i // (H // G)) for i in h)
        assert same_bits(call.mask, whole.mask[:, :, t]) and call.certificate.rows == len(t)
    lean = run(heads=heads, queries=queries, capture=("q", "k", "bias", "mask", "sinks"))
    assert all(torch.allclose(a.weights, b.weights, atol=1e-6) for a, b in zip(lean, trace, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_dtype_and_device(dtype: torch.dtype) -> None:
    full, trace = run()[0], run(dtype=dtype, device="cpu")[0]
    for name in ("q", "k", "v", "scores", "weights", "output"):
        assert torch.equal(getattr(trace, name).float(), getattr(full, name).to(dtype).float()), name
    assert trace.mask.dtype == torch.bool and trace.dtype == torch.float32 and trace.certificate.faithful


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(x.numel() for x in pytree.tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


@pytest.mark.parametrize("n", [{"heads": H, "groups": G}, {"heads": 8, "groups": 8}])
def test_nothing_large_is_formed_first(n: dict[str, int]) -> None:
    m, x = model(layers=1, **n), draw(1, 512, E, seed=2)
    for mask in (None, torch.zeros(512, 512).masked_fill(torch.ones(512, 512).triu(1) > 0, -1e9)):
        for options, bound in (({"queries": slice(-1, None)}, 512**2), ({"heads": 0}, 512**2), ({}, None)):
            with torch.no_grad(), Largest() as largest:
                hookattn.trace(m, (x, mask), capture=("weights",), **options)
            assert largest.numel == n["heads"] * 512 * 512 if bound is None else largest.numel <= bound, options


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["attention", "layer", "encoder", "decoder layer"])
def test_the_steps_of_a_model_that_is_one_of_torchs_own(kind: str, training: bool) -> None:
    """Some of these leave their fused path as soon as they are hooked; their forwards are counted all the same."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    made = {
        "attention": nn.MultiheadAttention(16, 2, batch_first=True),
        "layer": layer,
        "encoder": nn.TransformerEncoder(layer, 2),
        "decoder layer": nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
    }
    model = made[kind].train(training)
    x = torch.randn(2, 5, 16)
    inputs = {"attention": (x, x, x), "decoder layer": (x, x)}.get(kind, (x,))
    other = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    with torch.no_grad():
        plain = model(*inputs)
        with hookattn.tracing(model, strict=True) as found:
            outputs = [model(*inputs) for _ in range(3)]
            other(x)  # is not the model's
    steps = [call.step for call in found]
    per = {"encoder": 2, "decoder layer": 2}.get(kind, 1)
    assert steps == [i for i in range(3) for _ in range(per)]
    for out in outputs:
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (plain, out)), strict=True):
            assert a is b is None or torch.equal(a, b)
    check_clean(model)


@pytest.mark.parametrize("fails", [False, True])
def test_a_trace_that_is_dropped_is_gone_at_once(fails: bool) -> None:
    """Nothing that ran it still holds it until a garbage collection: its tensors may be most of the memory there is."""
    model = Model()
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(KeyError), hookattn.tracing(model) as found:
            model(X)
            if fails:
                raise KeyError
        gone = [weakref.ref(found), weakref.ref(found[0].q), weakref.ref(found[0])]
        del found
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()


def test_a_capture_that_is_no_field_is_refused_whatever_it_is() -> None:
    for capture in ((["q"],), ({"q": 1},), (3,), "", ("q", None), [[]], 3):
        with pytest.raises(SelectionError, match=r"choose among|expected"):
            hookattn.trace(Model(), X, capture=capture)


def test_an_attention_in_parts_is_at_the_module_around_them() -> None:
    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a @ b

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.softmax, self.values = Product(), nn.Softmax(-1), Product()

        def forward(self, x: Tensor) -> Tensor:
            return self.values(self.softmax(self.scores(x, x.mT)), x)

    model = nn.ModuleDict({"a": nn.ModuleList([Parts(), Parts()])})
    model.forward = lambda x: model["a"][1](model["a"][0](x))  # type: ignore[method-assign]
    found = hookattn.trace(model, X, strict=True)
    assert [(call.site.path, call.site.layer, call.site.module) for call in found] == [
        ("a.0", 0, "Parts"),
        ("a.1", 1, "Parts"),
    ]


def test_the_ways_in_take_the_same_keywords() -> None:
    """``trace``, ``tracing``, ``plan`` and the selection that they make of it spell out the same list."""

    def keywords(function: Any) -> dict[str, Any]:
        given = list(inspect.signature(function).parameters.values())
        return {p.name: p.default for p in given if p.kind is p.KEYWORD_ONLY or function is of}

    of = Selection.of
    whole, told, chosen = keywords(hookattn.trace), keywords(hookattn.plan), keywords(of)
    assert keywords(hookattn.tracing) == whole
    assert whole == api._DEFAULTS and list(api.TracingOptions.__annotations__) == list(whole)
    # No bytes depend on who checks a call, or on what its tokens are called; what a backward brings is no forward's.
    left_out = ("tokens", "verify", "strict", "copy", "gradients", "attached", "shard")
    assert told == {n: default for n, default in whole.items() if n not in left_out}
    assert chosen == {n: default for n, default in told.items() if n not in ("to", "layout")}
    assert list(chosen) == [f.name for f in dataclasses.fields(Selection) if f.name != "statistics"]
