"""Tracing changes nothing: what a model returns, what is left on it, what other threads and the user's hooks see."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import hookattn
from hookattn.models.registry import using
from hookattn.taps import hf_interface
from tests.reference import assert_untouched, draw, paths, same_bits, snapshot, trace_checked

B, T, E, H = 2, 6, 16, 4
X = draw(B, T, E, seed=1)
KINDS = ("sdpa", "eager", "mha", "flex")
LAYERS = ["layers.0", "layers.1"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:flex_attention called without", "ignore:None of the inputs have requires"
)


class Attn(nn.Module):
    """One attention in one of several spellings."""

    def __init__(self, kind: str, p: float) -> None:
        super().__init__()
        self.kind, self.p, self.out = kind, p, nn.Linear(E, E)
        self.inner = nn.MultiheadAttention(E, H, p, batch_first=True) if kind == "mha" else nn.Linear(E, 3 * E)
        self.meet: Callable[[], Any] = int

    def forward(self, x: Tensor) -> Tensor:
        self.meet()
        if self.kind == "mha":
            return self.out(self.inner(x, x, x, need_weights=False)[0])
        q, k, v = self.inner(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        if self.kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p * self.training, is_causal=True)
        elif self.kind == "flex":
            y = flex_attention(q, k, v)
        elif self.kind == "interface":  # as transformers looks its kernels up
            y = hf_interface.run(lambda _, *qkv: (F.scaled_dot_product_attention(*qkv),), "sdpa", self, q, k, v)[0]
        else:
            y = F.dropout((q @ k.mT / 2).softmax(-1), self.p, self.training) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self, kind: str, p: float, recompute: bool | None) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([Attn(kind, p), Attn(kind, p)]), nn.Linear(E, E)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (layer(x) if self.recompute is None else checkpoint(layer, x, use_reentrant=self.recompute))
        return self.head(x)


def net(kind: str = "sdpa", p: float = 0.0, recompute: bool | None = None, train: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(kind, p, recompute).train(train).requires_grad_(kind != "flex")  # which has no backward on the CPU


class Ours(hookattn.Adapter):
    name, covers, attention = "untouched", (__name__,), {"Attn": "self", "Cached": "self"}


@pytest.fixture(params=["generic", "adapter"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Watched as a whole, or bracketed at its sites alone."""
    with using(*([Ours()] if request.param == "adapter" else [])):
        yield request.param


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_when_the_forward_raises(way: str, kind: str, error: type[BaseException]) -> None:
    def fail(*_: Any) -> Any:
        raise error("half-way")

    model = net(kind)
    for spot, seen in (("layers.1", 1), ("layers.1.out", 2), ("head", 2)):  # around, inside and outside an attention
        broken = copy.deepcopy(model)
        broken.get_submodule(spot).register_forward_pre_hook(fail)
        before = snapshot(broken)
        with pytest.raises(error, match="half-way"):
            hookattn.trace(broken, X)
        assert_untouched(broken, before)
        with hookattn.tracing(broken) as trace:  # caught inside the block: it goes on, and all of it is seen
            for _ in range(2):
                with contextlib.suppress(error):
                    broken(X)
            broken.layers[0](X)
        assert len(trace) == 2 * seen + 1 and not trace.skipped
        assert_untouched(broken, before)
    trace_checked(hookattn.trace, model, X)


def test_nothing_is_left_when_the_library_raises(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(model := net())
    monkeypatch.setitem(hookattn.calls.certificate.TOLERANCE, torch.float32, -1.0)
    for options in ({"heads": [9]}, {"queries": [7]}, {"strict": True}):
        error = hookattn.UnfaithfulError if "strict" in options else hookattn.SelectionError
        with pytest.raises(error), hookattn.tracing(model, **options):
            model(X)
        assert_untouched(model, before)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_random_state(way: str, kind: str, train: bool) -> None:
    p = 0.0 if kind == "flex" else 0.3
    model = net(kind, p, train=train)
    half = torch.autocast("cpu", torch.bfloat16)
    for context in (contextlib.nullcontext(), torch.no_grad(), torch.inference_mode(), half):
        with context:
            trace = trace_checked(hookattn.trace, model, X)
        assert len(trace) == 2 and trace.faithful and trace[0].dropout == (p if train else 0.0)
        assert {c.dtype for c in trace} == {torch.bfloat16 if context is half else torch.float32}
    assert model.training is train and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["sdpa", "eager", "mha"])
def test_gradients(way: str, kind: str, train: bool) -> None:
    def grads(run: Callable[[Net, Tensor], Tensor]) -> list[Tensor | None]:
        model, x = net(kind, 0.2, train=train), X.clone().requires_grad_()
        torch.manual_seed(3)
        run(model, x).square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    plain = grads(lambda model, x: model(x))
    assert plain[0] is not None and plain[0].any()
    assert same_bits(plain, grads(lambda model, x: hookattn.trace(model, x, verify="full").output))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["sdpa", "eager", "mha"])
@pytest.mark.parametrize("how", [Tensor.backward, torch.autograd.backward])
def test_checkpointed_layers_are_not_seen_twice(way: str, kind: str, recompute: bool, how: Any) -> None:
    before = snapshot(model := net(kind, 0.1, recompute, train=True))
    with hookattn.tracing(model) as trace:
        for run in (model, lambda x: checkpoint(model, x, use_reentrant=recompute), model):
            how(run(X.clone().requires_grad_()).sum())
    assert [(c.site.path[:8], c.step) for c in trace] == [(layer, step) for step in (0, 1, 2) for layer in LAYERS]
    assert not trace.skipped and trace.faithful and model.layers[0].out.weight.grad is not None
    model.zero_grad()
    assert_untouched(model, before)


def together(*tasks: Callable[[], Any]) -> list[Any]:
    """Run each in its own thread; their results in order."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(torch.no_grad()(task)) for task in tasks]]


def meeting(*models: Net) -> list[Any]:
    """Have the threads wait for each other before every attention."""
    barrier = threading.Barrier(2, timeout=30)
    for model in models:
        model.layers[0].meet = model.layers[1].meet = barrier.wait
    return [snapshot(model) for model in models]


@pytest.mark.parametrize("kinds", [("sdpa", "eager"), ("mha", "mha"), ("mha", "flex"), ("flex", "sdpa")])
def test_two_threads_trace_two_models(way: str, kinds: tuple[str, str]) -> None:
    models, inputs = [net(kind) for kind in kinds], [X, draw(B, 4, E, seed=2)]
    plain = [together(lambda i=i: models[i](inputs[i]))[0] for i in (0, 1)]
    before = meeting(*models)
    for i, trace in enumerate(together(*(lambda i=i: hookattn.trace(models[i], inputs[i]) for i in (0, 1)))):
        assert same_bits(trace.output, plain[i]) and [c.q.shape[2] for c in trace] == [inputs[i].shape[1]] * 2
        assert_untouched(models[i], before[i])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
def test_a_thread_that_is_not_traced(way: str, kind: str, shared: bool) -> None:
    traced = net(kind if shared else "mha")
    other = traced if shared else net(kind)
    plain = together(lambda: (traced(X), other(X[:1])))[0]
    before = meeting(traced, other)
    trace, (out, modes) = together(
        lambda: hookattn.trace(traced, X), lambda: (other(X[:1]), torch._C._len_torch_function_stack())
    )
    assert same_bits((trace.output, out), plain) and modes == 0
    assert [(c.q.shape[0], c.step) for c in trace] == [(B, 0)] * 2
    assert_untouched(traced, before[0])
    assert_untouched(other, before[1])


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("how", ["module", "in place", "root", "forward", "nested"])
def test_compiled_parts(way: str, how: str, fullgraph: bool) -> None:
    compiled = partial(torch.compile, backend="eager", fullgraph=fullgraph)
    model: Any = net()
    plain, layer = model(X), model.layers[1]
    if how in ("module", "nested"):
        model.layers[1] = compiled(layer)
    elif how == "in place":
        layer.compile(backend="eager", fullgraph=fullgraph)
    elif how == "forward":
        layer.forward = compiled(layer.forward)
    if how in ("root", "nested"):
        model = compiled(model)
    for _ in range(2):  # before and after it was compiled
        trace = hookattn.trace(model, X)
        assert [p.replace("_orig_mod", "").strip(".") for p in paths(trace.calls)] == LAYERS and trace.faithful
        assert any("compiled" in note for note in trace.notes) and torch._C._len_torch_function_stack() == 0
        assert same_bits((trace.output, model(X)), (plain, plain))
    torch.compiler.reset()


class Count(TorchFunctionMode):
    names: tuple[str, ...] = ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += (getattr(func, "__name__", ""),)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["sdpa", "eager", "mha", "interface"])
def test_a_function_mode_and_hooks_of_the_users_own(way: str, kind: str) -> None:
    model, seen = net(kind), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append("after"))
        module.register_forward_pre_hook(lambda *_: seen.append("before"))
    with Count() as plain:
        expected = model(X)
    hooked, before = list(seen), snapshot(model)
    with Count() as around:
        outer = hookattn.trace(model, X, verify="full")
    with hookattn.tracing(model, verify="full") as inner, Count() as inside:
        inner.output = model(X)
    assert seen == hooked * 3 and same_bits([outer.output, inner.output], [expected] * 2)
    assert len(outer) == len(inner) == 2 and outer.faithful and inner.faithful
    assert "baddbmm" not in around.names + inside.names  # with which scores are derived
    for count in (around, inside):  # what it sees without a trace, in that order
        rest = iter(count.names)
        assert all(name in rest for name in plain.names)
        for name in ("linear", "softmax", "scaled_dot_product_attention", "multi_head_attention_forward"):
            assert count.names.count(name) == plain.names.count(name)
    with hookattn.tracing(model):
        around.__enter__()
        model(X)
    around.__exit__(None, None, None)  # only after the trace
    assert_untouched(model, before)


def test_a_function_mode_of_the_users_own_stays_where_it_is_when_an_attention_raises(way: str) -> None:
    model = net("mha")
    model.layers[1].inner.bias_k = nn.Parameter(torch.zeros(1, 1, E))
    model.layers[1].inner.bias_v = nn.Parameter(torch.zeros(1, 1, E + 1))  # raises in the body
    with Count() as first, Count() as second:
        with pytest.raises(RuntimeError):
            hookattn.trace(model, X)
        open_now = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
        assert open_now == [first, second]
    for count in (first, second):
        assert count.names.count("multi_head_attention_forward") == 2 and "softmax" not in count.names


class Cached(Attn):
    """Keeps keys, values and mask in buffers, and writes to them in place."""

    def start(self) -> None:
        self.calls, self.cache, self.mask = 0, torch.zeros(3, B, H, T, E // H), torch.zeros(T, T)

    def forward(self, x: Tensor) -> Tensor:
        self.mask[self.calls, self.calls + 1 :] = -torch.inf
        self.calls += 1
        self.cache.copy_(self.inner(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4))
        return self.out(F.scaled_dot_product_attention(*self.cache, self.mask).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_captured_tensors_are_copies(way: str, grad: Any) -> None:
    attn = Cached("sdpa", 0.0)
    with grad():
        attn.start()
        trace = hookattn.trace(nn.Sequential(attn, attn), X, verify="full")
        first, second = trace.select(path="0")  # one module, called twice
        assert trace.faithful and not same_bits(first.k, second.k) and same_bits(second.k, attn.cache[1])
        assert int((~first.mask).sum()) == T - 1 and int((~second.mask).sum()) == 2 * T - 3
        mine = [x for name in second.fields if (x := second.get(name)) is not None]
        kept, one = [x.clone() for x in mine], first.k.clone()
        attn.cache.fill_(7.0), attn.mask.fill_(7.0)
        assert same_bits(mine, kept)
        assert all(x.zero_() is x for x in mine) and same_bits(first.k, one) and bool((attn.cache == 7.0).all())


def test_a_trace_leaves_nothing_for_the_garbage_collector(way: str) -> None:
    model = net()
    for _ in range(3):
        hookattn.trace(model, X)
    for _ in range(5):  # what other tests left may take several
        gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            hookattn.trace(model, X)
        assert gc.collect() < 3, "objects that refer to each other, and the tensors they hold, would wait for it"
    finally:
        gc.enable()


def test_forwards_of_a_part_and_several_forwards(way: str) -> None:
    model = net()
    with hookattn.tracing(model) as trace:
        model.layers[1](X)
        model(X)
        model(X[:1])
    assert paths(trace.calls) == ["layers.1", *LAYERS, *LAYERS] and [c.step for c in trace] == [0, 1, 1, 2, 2]
    assert [c.entry for c in trace] == ["layers.1", "", "", "", ""]
    assert trace[-1].q.shape[0] == 1 and trace[-1].site.layer == 1
