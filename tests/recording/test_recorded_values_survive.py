"""What was recorded stays what it was when the model ran, whatever the model does to its tensors afterwards; and the
model's outputs are bit-identical, with a trace and without.

The models take copies of what they hand to a kernel themselves, at the time of the call, and are held against these.
"""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils.checkpoint import checkpoint

import hookattn
from hookattn.torch_internals import allocation, lazy_copies
from hookattn.torch_internals.lazy_copies import is_lazy
from tests import tiny_models
from tests.reference import draw, merge, reference_attention, same_bits
from tests.writes import WRITES, Doubled, Write

pytestmark = pytest.mark.filterwarnings(
    "ignore:TypedStorage is deprecated", "ignore:There is a performance drop", "ignore:`past_key_values` is deprecated"
)

B, T, H, D = 2, 5, 3, 4
E = H * D
X = draw(B, T, E, seed=1)
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
FIELDS = ("q", "k", "v", "bias", "scores", "mask", "weights", "output")
Live = dict[str, Tensor]


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are copied at once; here they stand for large ones."""
    monkeypatch.setattr(lazy_copies, "SMALL", -1)


def nothing(live: Live) -> None:
    """What a well-behaved model does."""


class Attention(nn.Module):
    """One attention that says what it was given, and then does something to it.

    Args:
        kernel: ``"mask"`` and ``"bias"``: the fused kernel with one or the other; ``"eager"``: written out, with both.
    """

    def __init__(self, kernel: str = "mask", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.kernel = kernel
        torch.manual_seed(0)
        self.inner, self.out = nn.Linear(E, 3 * E, dtype=dtype), nn.Linear(E, E, dtype=dtype)
        self.afterwards: Callable[[Live], Any] = nothing
        self.seen: list[Live] = []
        self.live: Live = {}

    def qkv(self, x: Tensor) -> Live:
        fused = self.inner(x)
        # Each a view of its own: torch lets nobody write to what came of unbind, where gradients are needed.
        q, k, v = (fused.unflatten(-1, (3, H, -1))[:, :, i].transpose(1, 2) for i in range(3))
        return {"fused": fused, "q": q, "k": k, "v": v}

    def beside(self, x: Tensor) -> Live:
        t = x.shape[1]
        mask = (x.detach()[:, None, :, :1] + x.detach()[:, None, None, :, 0] > 0) | torch.eye(t, dtype=torch.bool)
        bias = torch.tanh(x.detach()[:, None, :, 1:2] - x.detach()[:, None, None, :, 1]).repeat(1, H, 1, 1)
        return {"mask": mask, "bias": bias}

    def attend(self, live: Live) -> None:
        q, k, v = live["q"], live["k"], live["v"]
        if self.kernel == "eager":
            live["scores"] = q @ k.mT / math.sqrt(D) + live["bias"]
            live["weights"] = live["scores"].masked_fill(~live["mask"], -torch.inf).softmax(-1)
            live["output"] = live["weights"] @ v
        else:
            live["output"] = F.scaled_dot_product_attention(q, k, v, live[self.kernel])
            del live["bias" if self.kernel == "mask" else "mask"]

    def forward(self, x: Tensor) -> Any:
        live = {**self.qkv(x), **self.beside(x)}
        self.attend(live)
        self.seen.append({name: y.detach().clone() for name, y in live.items()})
        y = self.out(merge(live["output"]))
        self.live = live
        self.afterwards(live)
        return y, {n: z.detach() + 0 for n, z in live.items() if is_functorch_wrapped_tensor(z) or z.untyped_storage()}


def survived(call: hookattn.Call, seen: Live, tol: float = 1e-5) -> None:
    """A call holds what the model saw, bit for bit, and what follows from it."""
    for name in FIELDS:
        if name in seen and name != "scores":
            recorded = call.get(name)
            if recorded is None and name == "bias":  # one that is 0 is none
                recorded = torch.zeros_like(seen[name])
            assert same_bits(recorded, seen[name]), f"{name} is not what it was"
    mask, bias = seen.get("mask"), seen.get("bias")
    q, k, v = (seen[n] for n in "qkv")
    scores, weights, _ = reference_attention(q, k, v, scale=1 / math.sqrt(D), mask=mask, bias=bias)
    torch.testing.assert_close(call.scores.double(), scores, atol=tol, rtol=tol)
    torch.testing.assert_close(call.weights.double(), weights, atol=tol, rtol=tol)
    assert call.certificate.faithful, call.certificate


def outputs(model: nn.Module, mode: str = "no_grad", x: Tensor = X) -> Any:
    """What the model returns without a trace."""
    torch.manual_seed(3)
    with MODES[mode]():
        return model(x)


def traced(model: nn.Module, mode: str = "no_grad", x: Tensor = X, **options: Any) -> hookattn.Trace:
    torch.manual_seed(3)
    with MODES[mode]():
        return hookattn.trace(model, x, **options)


def on(write: Write, names: Sequence[str]) -> Callable[[Live], None]:
    """Write to some of a model's tensors, those that gradients are needed of as somebody does who means it."""

    def afterwards(live: Live) -> None:
        for name in names:
            if name in live:
                write(live[name].detach() if live[name].requires_grad else live[name])

    return afterwards


# ------------------------------------------------------------------------------------------------ whoever writes

FLOATS = ("fused", "q", "k", "v", "bias", "scores", "weights", "output")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", ["mask", "bias", "eager"])
@pytest.mark.parametrize("name", WRITES)
def test_values_survive_what_the_model_writes(name: str, kernel: str, mode: str) -> None:
    # What makes a tensor's memory smaller is no write to others of the same memory.
    names = ("k", "bias", "weights", "output") if name in ("freed storage", "smaller") else FLOATS
    inside, later = Attention(kernel), Attention(kernel)
    inside.afterwards = on(WRITES[name], names)
    expected = outputs(inside, mode)
    inside.seen.clear()
    trace = traced(inside, mode)
    assert same_bits(trace.output, expected)
    survived(trace.calls[0], inside.seen[0])
    trace = traced(later, mode)
    with MODES[mode]():
        inside.afterwards(later.live)
    survived(trace.calls[0], later.seen[0])


MASKED: dict[str, Write] = {
    "logical_not_": lambda x: x.logical_not_(),
    "masked_fill_": lambda x: x.masked_fill_(~x, True),
    "item assignment": lambda x: x.__setitem__((..., 0), True),
    "index_copy_": lambda x: x.index_copy_(-1, torch.tensor([0]), ~x[..., :1]),
    "out=": lambda x: torch.logical_not(x, out=x),
    ".data": lambda x: x.data.logical_not_(),
    "storage.fill_": lambda x: x.untyped_storage().fill_(1),
    "numpy": lambda x: x.numpy().fill(True),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", ["mask", "eager"])
@pytest.mark.parametrize("name", MASKED)
def test_masks_survive(name: str, kernel: str, mode: str) -> None:
    model = Attention(kernel)
    model.afterwards = on(MASKED[name], ["mask"])
    expected = outputs(model, mode)
    model.seen.clear()
    trace = traced(model, mode)
    assert same_bits(trace.output, expected)
    survived(trace.calls[0], model.seen[0])


class Layers(nn.Module):
    """Layers that share a mask or a bias, which somebody writes to between them."""

    def __init__(self, kernel: str, write: Write) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(kernel), Attention(kernel), Attention(kernel)])
        self.kernel, self.write = kernel, write

    def forward(self, x: Tensor) -> Tensor:
        shared = Attention.beside(self.layers[0], x)  # type: ignore[arg-type]
        for i, layer in enumerate(self.layers):
            layer.beside = lambda _: dict(shared)
            y, _ = layer(x)
            x = x + y
            if i == 1:
                self.write(shared[self.kernel])
        return x


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", ["mask", "bias"])
@pytest.mark.parametrize("name", ["item assignment", "out=", ".data", "storage.fill_", "numpy"])
def test_a_mask_that_layers_share_is_recorded_as_each_saw_it(kernel: str, name: str, mode: str) -> None:
    model = Layers(kernel, (MASKED if kernel == "mask" else WRITES)[name])
    expected = outputs(model, mode)
    for layer in model.layers:
        layer.seen.clear()
    trace = traced(model, mode)
    assert same_bits(trace.output, expected)
    for call, layer in zip(trace.calls, model.layers, strict=True):
        survived(call, layer.seen[0])


# ------------------------------------------------------------------------------------------------ backward


class HalvesInBackward(torch.autograd.Function):
    """An attention of somebody's own whose backward uses up what it saved."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            y = F.scaled_dot_product_attention(*leaves)
        grads = torch.autograd.grad(y, leaves, grad)
        for x in (*ctx.saved_tensors, grad):
            x.data.mul_(0.5)
        return grads


def hooks(live: Live) -> None:
    """Backward hooks that write to what the forward left."""
    for name in ("q", "k", "v", "output"):

        def hook(grad: Tensor, x: Tensor = live[name]) -> Tensor:
            x.data.zero_()
            return grad.mul_(2)

        live[name].register_hook(hook)


def in_place(live: Live) -> None:
    """Writes that autograd knows of, and gives gradients through."""
    live["output"] = F.dropout(live["output"].clone(), 0.0).mul_(2).add_(live["q"].clone().relu_())
    live["extra"] = Doubled.apply(live["k"])  # nothing was saved of it that backward needs


class Trained(nn.Module):
    """Two attentions, each after the other's writing, under activation checkpointing or not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList([Attention("eager" if kind == "eager" else "mask"), Attention()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.kind in ("reentrant", "checkpoint"):
                y = checkpoint(lambda x, layer=layer: layer(x)[0], x, use_reentrant=self.kind == "reentrant")
            else:
                y, _ = layer(x)
            x = x + y
        return x


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    model.zero_grad()
    x = X.clone().requires_grad_()
    run(x).square().sum().backward()
    grads = [x.grad, *(p.grad for p in model.parameters())]
    assert all(g is not None for g in grads)
    return [g.clone() for g in grads if g is not None]


@pytest.mark.parametrize("kind", ["plain", "eager", "reentrant", "checkpoint", "hooks", "Function"])
@pytest.mark.parametrize("inside", [False, True], ids=["after", "inside"])
def test_values_survive_a_backward(kind: str, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Trained(kind)
    if kind == "Function":
        monkeypatch.setattr(
            Attention, "attend", lambda _, live: live.update(output=HalvesInBackward.apply(*(live[n] for n in "qkv")))
        )
        monkeypatch.setattr(Attention, "beside", lambda *_: {})
    if kind == "hooks":
        for layer in model.layers:
            layer.afterwards = hooks
    expected = gradients(model, model)
    for layer in model.layers:
        layer.seen.clear()
    traces: list[hookattn.Trace] = []

    def run(x: Tensor) -> Tensor:
        traces.append(hookattn.trace(model, x))
        return traces[0].output

    if inside:
        with hookattn.tracing(model) as trace:
            found = gradients(model, model)
    else:
        found = gradients(model, run)
        (trace,) = traces
    assert same_bits(found, expected)
    with torch.no_grad():
        for layer in model.layers:
            for x in layer.live.values():
                x.zero_()
    assert len(trace.calls) == 2
    for call, layer in zip(trace.calls, model.layers, strict=True):
        survived(call, layer.seen[0])


def test_training_goes_on_as_without_a_trace() -> None:
    def trained(trace: bool) -> tuple[list[Tensor], list[Tensor]]:
        model = Trained("plain")
        optimizer = torch.optim.AdamW(model.parameters(), 0.05)
        losses, traces = [], []
        for _ in range(4):
            if trace:
                traces.append(hookattn.trace(model, X))
            loss = (traces[-1].output if trace else model(X)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        for i, one in enumerate(traces):
            for call, layer in zip(one.calls, model.layers, strict=True):
                survived(call, layer.seen[i])
        return losses, [p.detach() for p in model.parameters()]

    assert same_bits(trained(True), trained(False))


# ------------------------------------------------------------------------------------------------ other ways to run


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::hookattn.SkippedWarning")
def test_a_compiled_function_that_writes() -> None:
    torch.compiler.reset()

    @torch.compile(backend="aot_eager")
    def write(q: Tensor, v: Tensor) -> Tensor:
        q.mul_(2)
        v[..., :1] = 3
        return q + v

    def afterwards(live: Live) -> None:
        live["extra"] = write(live["q"], live["output"])

    model = Attention()
    model.afterwards = afterwards
    expected = outputs(model)
    model.seen.clear()
    trace = traced(model)
    assert same_bits(trace.output, expected)
    survived(trace.calls[0], model.seen[0])
    model.afterwards = nothing
    trace = traced(model)
    with torch.no_grad():
        afterwards(model.live)  # outside of the trace, so that it runs compiled
    survived(trace.calls[0], model.seen[-1])
    torch.compiler.reset()


def test_other_threads_write() -> None:
    model = Attention()
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def afterwards(live: Live) -> None:
        def write() -> None:
            while not stop.is_set():
                for x in live.values():
                    x.data.logical_not_()

        threads.append(threading.Thread(target=write))
        threads[-1].start()

    model.afterwards = afterwards
    model.forward = lambda x, forward=model.forward: forward(x)[0]  # type: ignore[method-assign]
    traces = [traced(model) for _ in range(5)]
    stop.set()
    for thread in threads:
        thread.join()
    for trace, seen in zip(traces, model.seen, strict=True):
        survived(trace.calls[0], seen)


class Mapped(nn.Module):
    """An attention inside vmap whose input is written to inside and outside of it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            y = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
            q.mul_(3)
            return y

        y = torch.vmap(one)(q, k, v)
        for x in (k, v):
            x.zero_()
        return y, q + 0


def test_what_is_mapped_runs_as_without_a_trace_and_survives() -> None:
    model = Mapped()
    with torch.no_grad():
        expected = model(*drawn(B, H, T, D))
        with hookattn.tracing(model) as trace:
            found = model(*drawn(B, H, T, D))
    assert same_bits(found, expected)
    (call,) = trace
    assert same_bits((call.q, call.k, call.v), drawn(B, H, T, D)) and trace.faithful


def test_function_transforms() -> None:
    model = Attention()
    parameters = dict(model.named_parameters())

    def loss(parameters: Live) -> Tensor:
        return torch.func.functional_call(model, parameters, (X,))[0].square().sum()

    expected = torch.func.grad(loss)(parameters)
    model.seen.clear()
    with hookattn.tracing(model) as trace:
        found = torch.func.grad(loss)(parameters)
    assert same_bits(found, expected)
    with torch.no_grad():
        for x in (*model.live.values(), *model.parameters()):
            x.zero_()
    survived(trace.calls[0], model.seen[0])


# ------------------------------------------------------------------------------------------------ caches


class Cached(nn.Module):
    """Attention over a cache of its own, one token after the other.

    Args:
        kind: how the cache is kept. ``"static"``: written in place; ``"rolled"``: the same, and rolled when it is full;
            ``"cropped"``: static, of which a kernel gets what is filled; ``"quantised"``: in 8 bits, widened into one
            buffer at each step; ``"growing"``: concatenated, and the old one zeroed.
    """

    size = 4

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.inner, self.filled = kind, nn.Linear(E, 3 * E), 0
        shape = (B, H, 0 if kind == "growing" else self.size, D)
        dtype = torch.int8 if kind == "quantised" else torch.float32
        self.keys, self.values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        self.workspace = torch.zeros(2, B, H, self.size, D)
        self.seen: list[Live] = []

    def forward(self, x: Tensor) -> Tensor:
        q, *new = self.inner(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        at = torch.tensor([min(self.filled, self.size - 1)])
        n = int(at) + 1
        mask: Tensor | None = (torch.arange(self.size) < n).view(1, 1, 1, -1)
        kv = []
        for i, (name, x) in enumerate(zip(("keys", "values"), new, strict=True)):
            cache = getattr(self, name)
            if self.kind == "growing":
                kv.append(torch.cat([cache, x], 2))
                cache.zero_()
                setattr(self, name, kv[-1])
                mask = None
                continue
            if self.kind == "rolled" and self.filled >= self.size:
                cache.copy_(cache.roll(-1, 2))
            cache.index_copy_(2, at, (x * 50).to(torch.int8) if self.kind == "quantised" else x)
            if self.kind == "quantised":
                cache = torch.mul(cache, 0.02, out=self.workspace[i])
            kv.append(cache[:, :, :n] if self.kind == "cropped" else cache)
        if self.kind == "cropped":
            mask = None
        self.filled += 1
        y = F.scaled_dot_product_attention(q, *kv, attn_mask=mask)
        self.seen.append({n: t.clone() for n, t in zip("qkv", (q, *kv), strict=True)} | {"output": y.clone()})
        if mask is not None:
            self.seen[-1]["mask"] = mask.clone()
        return merge(y)


def generated(model: Cached, steps: int = 7) -> list[Tensor]:
    return [model(draw(B, 1, E, seed=i)) for i in range(steps)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["static", "rolled", "cropped", "quantised", "growing"])
def test_caches_that_are_written_to_at_each_step(kind: str, mode: str) -> None:
    with torch.no_grad() if mode == "grad" else MODES[mode]():
        model = Cached(kind)
        expected = generated(Cached(kind))
        addresses = model.keys.data_ptr(), model.workspace.data_ptr()
        with hookattn.tracing(model) as trace:
            assert same_bits(generated(model), expected)
        if mode != "inference" and kind != "growing":  # where nobody counts writes, nobody can tell a cache
            assert (model.keys.data_ptr(), model.workspace.data_ptr()) == addresses
        model.keys.fill_(9)
        model.workspace.fill_(9)
        assert len(trace.calls) == len(model.seen) == 7
        for call, seen in zip(trace.calls, model.seen, strict=True):
            survived(call, seen)


# ------------------------------------------------------------------------------------------------ transformers


def noted(seen: list[Live]) -> Callable[..., Any]:
    """An attention function of transformers that notes what it hands to the fused kernel."""

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **given: Any) -> Any:
        y = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None and q.shape[2] > 1, scale=given["scaling"], enable_gqa=True
        )
        seen.append({"q": q.clone(), "k": k.clone(), "v": v.clone(), "output": y.clone()})
        if mask is not None:
            seen[-1]["mask"] = mask.clone()
        return y.transpose(1, 2).contiguous(), None

    return attend


CACHES: dict[str, Callable[[Any], Any]] = {
    "static": lambda config: tiny_models.transformers.StaticCache(config=config, max_cache_len=16),
    "dynamic": lambda config: tiny_models.transformers.DynamicCache(config=config),
}


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
@pytest.mark.parametrize("window", [None, 4], ids=["full", "sliding"])
@pytest.mark.parametrize("kind", CACHES)
def test_caches_of_transformers(kind: str, window: int | None, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    seen: list[Live] = []
    known = tiny_models.transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(known._global_mapping, "noted", noted(seen))
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "noted", sdpa_mask)
    options = {"sliding_window": window} if window else {}
    model = tiny_models.build(
        "MistralForCausalLM",
        "MistralConfig",
        "noted",
        **tiny_models.SMALL,
        **tiny_models.WORDS,
        num_key_value_heads=2,
        **options,
    )

    addresses: list[int] = []

    def run() -> tuple[list[Tensor], Any]:
        cache, logits = CACHES[kind](model.config), []
        tokens = torch.arange(1, 4).expand(B, -1)
        for i in range(6):
            if i == 2:
                addresses.append(torch._C._data_address(cache.layers[0].keys))
            logits.append(model(tokens, past_key_values=cache, use_cache=True).logits.clone())
            tokens = logits[-1][:, -1:].argmax(-1)
            if i == 3 and kind == "dynamic" and window is None:
                cache.crop(-2)
        return logits, cache

    with MODES[mode]():
        expected, _ = run()
        seen.clear()
        with hookattn.tracing(model) as trace:
            found, cache = run()
        if (kind, mode) == ("static", "no_grad"):  # where nobody counts writes, nobody can tell a cache
            assert cache.layers[0].keys.data_ptr() == addresses[-1]
        for layer in cache.layers:
            layer.keys.zero_()
            layer.values.normal_()
    assert same_bits(found, expected) and len(trace.calls) == len(seen) == 12
    for call, one in zip(trace.calls, seen, strict=True):
        for name in ("q", "k", "v", "output"):
            assert same_bits(call.get(name), one[name]), (call, name)
        if "mask" in one:
            assert torch.equal(call.mask.expand(one["mask"].shape), one["mask"])
        mask = call.mask if "mask" in one else None
        _, weights, _ = reference_attention(
            call.q, call.k, call.v, scale=call.scale, mask=call.mask if mask is None else mask
        )
        torch.testing.assert_close(call.weights.double(), weights, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ all kinds of tensors


class Handed(nn.Module):
    """An attention over tensors that it is handed, and zeroes afterwards."""

    def __init__(self, write: Write = Tensor.zero_) -> None:
        super().__init__()
        self.write = write
        self.seen: Live = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        y = F.scaled_dot_product_attention(q, k, v)
        self.seen = {n: x.clone() for n, x in zip(("q", "k", "v", "output"), (q, k, v, y), strict=True)}
        for x in {id(x): x for x in (q, k, v)}.values():
            self.write(x)
        return y, q + 0, k + 0, v + 0


class Kin(Tensor):
    """A tensor of another class."""


def drawn(*shape: int) -> tuple[Tensor, ...]:
    return tuple(draw(*shape, seed=i) for i in range(3))


def buffers() -> tuple[Tensor, ...]:
    return tuple(torch.frombuffer(bytearray(x.numpy().tobytes()), dtype=x.dtype).view_as(x) for x in drawn(B, H, T, D))


def mapped(folder: Path) -> tuple[Tensor, ...]:
    made = []
    for i, x in enumerate(drawn(B, H, T, D)):
        (folder / str(i)).write_bytes(x.numpy().tobytes())
        made.append(torch.from_file(str(folder / str(i)), shared=True, size=x.numel()).view_as(x))
    return tuple(made)


HANDED: dict[str, Callable[[Path], tuple[Tensor, ...]]] = {
    "own": lambda _: drawn(B, H, T, D),
    "one for all": lambda _: (draw(B, H, T, D),) * 3,
    "numpy": lambda _: tuple(torch.from_numpy(x.numpy().copy()) for x in drawn(B, H, T, D)),
    "frombuffer": lambda _: buffers(),
    "mapped": mapped,
    "shared memory": lambda _: tuple(x.share_memory_() for x in drawn(B, H, T, D)),
    "a subclass": lambda _: tuple(x.as_subclass(Kin) for x in drawn(B, H, T, D)),
    "not contiguous": lambda _: tuple(x.transpose(1, 2) for x in drawn(B, T, H, D)),
    "every other": lambda _: tuple(x[..., ::2] for x in drawn(B, H, T, 2 * D)),
    "a small part": lambda _: tuple(x[:, :, 3 : 3 + T] for x in drawn(B, H, 8 * T, D)),
    "thirds": lambda _: tuple(draw(B, T, 3 * E).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)),
    "no queries": lambda _: (draw(B, H, 0, D), *drawn(B, H, T, D)[1:]),
    "no batch": lambda _: drawn(0, H, T, D),
    "float64": lambda _: tuple(x.double() for x in drawn(B, H, T, D)),
    "float16": lambda _: tuple(x.half() for x in drawn(B, H, T, D)),
    "bfloat16": lambda _: tuple(x.bfloat16() for x in drawn(B, H, T, D)),
}


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
@pytest.mark.parametrize("kind", HANDED)
def test_kinds_of_tensors(kind: str, mode: str, tmp_path: Path) -> None:
    with MODES[mode]():
        model = Handed()
        expected = model(*HANDED[kind](tmp_path))
        given = HANDED[kind](tmp_path)
        trace = hookattn.trace(model, given)
    assert same_bits(trace.output, expected) and all(not x.any() for x in given)
    for name, x in model.seen.items():
        assert same_bits(trace.calls[0].get(name), x.as_subclass(Tensor)), name


def test_expanded_tensors_survive() -> None:
    keys, values = draw(B, 1, T, D, seed=1), draw(B, 1, T, D, seed=2)
    model = Handed(lambda x: x[:, :1].zero_())
    with torch.no_grad():
        trace = hookattn.trace(model, (draw(B, H, T, D), keys.expand(B, H, T, D), values.expand(B, H, T, D)))
    assert not keys.any()
    for name, x in model.seen.items():
        assert torch.equal(trace.calls[0].get(name).expand(x.shape), x), name


class Learned(nn.Module):
    """Learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(draw(T, E, seed=5))
        self.inner = nn.Linear(E, 2 * E)

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries.expand(B, T, E).unflatten(-1, (H, D)).transpose(1, 2)
        k, v = self.inner(x).unflatten(-1, (2, H, D)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("mode", MODES)
def test_learned_queries_stay_where_they_are(mode: str) -> None:
    model = Learned()
    before, address = model.queries.detach().clone(), model.queries.data_ptr()
    trace = traced(model, mode)
    assert not is_lazy(model.queries)
    # Sharded training frees the memory of parameters between two uses.
    model.queries.untyped_storage().resize_(0)
    model.queries.untyped_storage().resize_(before.nbytes)
    with torch.no_grad():
        model.queries.fill_(3)
    assert torch.equal(trace.calls[0].q, before.unflatten(-1, (H, D)).transpose(0, 1).expand(B, H, T, D)) and address


def test_writing_to_what_was_recorded_changes_nothing_else() -> None:
    model = Attention("eager")
    expected = outputs(model)
    trace = traced(model)
    call = trace.calls[0]
    for name in ("q", "k", "v", "output", "weights", "scores"):
        kept = {n: y.clone() for n, y in model.live.items()}
        others = {n: call.get(n).clone() for n in ("q", "k", "v", "output", "weights", "scores") if n != name}
        call.get(name).fill_(7)
        assert same_bits(model.live, kept), f"a write to {name} of the trace reached the model"
        assert same_bits({n: call.get(n) for n in others}, others)
    assert same_bits(outputs(model), expected)


# ------------------------------------------------------------------------------------------------ known limits


class Grows(Attention):
    """An attention whose output's memory is made larger, and written to."""

    def __init__(self, how: str) -> None:
        super().__init__()

        def afterwards(live: Live) -> None:
            x = live["output"]
            live["before"] = x.clone()
            if how == "resize_":
                x.resize_(2 * x.numel()).fill_(3)
            elif how == "out=":
                torch.add(torch.ones(B, H, 2 * T, D), 1, out=x.resize_(0))
            else:
                x.untyped_storage().resize_(0)
                x.untyped_storage().resize_(live["before"].nbytes)
                x.untyped_storage().copy_(live["before"].untyped_storage())

        self.afterwards = afterwards


@pytest.mark.parametrize("how", ["resize_", "out=", "freed and back"])
def test_memory_that_is_resized_needs_copy(how: str) -> None:
    model = Grows(how)
    expected = outputs(model)
    model.seen.clear()
    trace = traced(model, copy=True)
    assert same_bits(trace.output, expected)
    survived(trace.calls[0], model.seen[0])
    # Without, torch 2.8 follows, and 2.13 raises: never are other values recorded, or returned.
    try:
        trace = traced(model)
    except RuntimeError as error:
        assert "COW.cpp" in str(error), error
    else:
        assert same_bits(trace.output, expected)
        survived(trace.calls[0], model.seen[1])


@pytest.mark.filterwarnings("ignore::hookattn.UnfaithfulWarning")  # which says what happened
@pytest.mark.parametrize("export", [Tensor.numpy, torch.from_dlpack], ids=["numpy", "dlpack"])
def test_aliases_from_before_that_write_unseen(export: Callable[[Tensor], Any]) -> None:
    # An array of numpy's is noticed, and what it is of is copied. A raw address otherwise leaves no trace: with
    # copy=True nothing can happen.
    for copied in (False, True):
        given = drawn(B, H, T, D)
        aliases = [export(x) for x in given]
        model = Handed(lambda x: None)
        with torch.no_grad():
            trace = hookattn.trace(model, given, copy=copied)
        for alias in aliases:
            alias[...] = 4
        held = [same_bits(trace.calls[0].get(n), model.seen[n]) for n in "qkv"]
        assert held == [copied or export is Tensor.numpy] * 3
        given[0].fill_(5)
        assert bool((torch.as_tensor(aliases[0]) == 5).all()) == held[0]


# ------------------------------------------------------------------------------------------------ what it costs


@pytest.fixture
def real_copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all real copies that are made."""
    made: list[tuple[int, ...]] = []
    copies = allocation.copies

    def counted(several: Sequence[Tensor]) -> list[Tensor]:
        made.extend(tuple(x.shape) for x in several)
        return copies(several)

    monkeypatch.setattr(allocation, "copies", counted)
    return made


IDS = {"input_ids": torch.arange(1, 11).view(1, -1)}
ORDINARY: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "llama": lambda: (tiny_models.llama(), IDS),
    "llama, eager": lambda: (tiny_models.llama("eager"), IDS),
    "gpt2": lambda: (tiny_models.gpt2(), {**IDS, "use_cache": False}),
    "gpt2, eager": lambda: (tiny_models.gpt2("eager"), {**IDS, "use_cache": False}),
    "bert": lambda: (tiny_models.bert(), IDS),
    "encoder": lambda: (encoder(), X),
    "encoder, causal": lambda: (encoder(), (X, nn.Transformer.generate_square_subsequent_mask(T))),
}


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 2 * E, batch_first=True), 2).eval()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_trace_copies_nothing(name: str, mode: str, real_copies: list[tuple[int, ...]]) -> None:
    model, inputs = ORDINARY[name]()
    with MODES[mode]():
        trace = hookattn.trace(model, inputs)
    assert len(trace.calls) == 2 and real_copies == []
    assert len(repr(trace)) > 0 and trace.calls[0].site.layer == 0
    for call in trace.calls:
        here = {n: x for n, x in call.fields.items() if isinstance(x, Tensor)}
        own = {"scores", "weights"} if "eager" in name else set()
        assert {"q", "k", "v", "output"} | own <= set(here) and len(repr(call)) > len(call.shape) > 0
        for x in here.values():
            assert len(x) == x.shape[0] and repr(x) and x.dtype == torch.float32
            assert torch.equal(x @ x.mT, x.clone() @ x.contiguous().mT)
        assert call.weights.shape[-2:] == call.scores.shape[-2:] and call.certificate.faithful
        assert all(map(is_lazy, here.values())), "reading made copies"
    assert real_copies == []


def test_of_a_fused_projection_only_what_the_cache_left_behind_is_copied(real_copies: list[tuple[int, ...]]) -> None:
    # A cache copies k and v: q, alone with a storage three times its size, would hold all of it.
    with torch.no_grad():
        trace = hookattn.trace(tiny_models.gpt2(), IDS)
    assert real_copies == [tuple(call.q.shape) for call in trace.calls]


def resident() -> float:
    """MiB that are resident."""
    found = Path("/proc/self/statm")
    if not found.exists():
        pytest.skip("only Linux says how much memory is resident")
    gc.collect()
    return int(found.read_text().split()[1]) * 4096 / 2**20


def test_memory_is_given_back() -> None:
    # 40 MiB a tensor, which the allocator asks the system for, and gives back at once.
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.q, self.k, self.v = x * 2, x[:, :, :1] + 1, x[:, :, :1] + 2
            self.output = F.scaled_dot_product_attention(self.q, self.k, self.v)
            return self.output

    model, x = Large(), torch.zeros(1, 1, 10 << 13, 128)
    with torch.no_grad():
        model(x)
        del model.q, model.k, model.v, model.output
        gc.collect()  # what other tests left would go in the middle of this one
        start = resident()
        torch.ones(1, 1, 10 << 13, 128)
        if resident() - start > 5:
            pytest.skip("in this process the allocator keeps what is freed, so that nothing can be told by it")
        held = torch.ones(1, 1, 10 << 13, 128)
        if resident() - start < 35:
            pytest.skip("in this process the allocator has kept what was freed, so that nothing can be told by it")
        del held
        start = resident()
        trace = hookattn.trace(model, x, verify="off")
    assert resident() - start < 90, "q and output, once"
    tensors = [weakref.ref(y) for y in (model.q, model.output)]
    model.q.zero_()
    assert 110 < resident() - start < 130, "a write parts q from what was recorded"
    del model.q, model.k, model.v, model.output
    trace.output = None
    assert not any(ref() is not None for ref in tensors), "the trace holds a tensor of the model's"
    assert 70 < resident() - start < 90, "what was recorded, and no more"
    del trace
    assert resident() - start < 10


def test_a_trace_that_is_gone_leaves_the_model_its_memory() -> None:
    x = torch.ones(1, 1, 10 << 13, 128)
    with torch.no_grad():
        start = resident()
        trace = hookattn.trace(Handed(lambda x: None), (x, x[:, :, :1] + 0, x[:, :, :1] + 0), verify="off", capture="q")
        del trace
        before = resident()
        x.add_(1)
    assert resident() - max(start, before) < 5, "nobody shares it any more: the write is in place"
