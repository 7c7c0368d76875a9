"""The native calls of torch's attention modules, read from inside: against the same kernels, run one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hookattn
from hookattn.taps import native_layers
from tests.reference import assert_close, assert_same_values, draw, reference_attention

B, T, E, H = 2, 5, 16, 4
D = E // H
PADDING = torch.arange(T).expand(B, T) >= torch.tensor([[T], [T - 2]])
LATER = torch.ones(T, T, dtype=torch.bool).triu(1)


def attention(**options: Any) -> nn.MultiheadAttention:
    return drawn(nn.MultiheadAttention(E, H, batch_first=True, **options))


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return drawn(nn.TransformerEncoderLayer(E, H, 2 * E, batch_first=True, **options))


def drawn(module: Any) -> Any:
    for n, (name, parameter) in enumerate(module.named_parameters()):
        if "norm" not in name:
            parameter.data.copy_(draw(*parameter.shape, seed=n, std=0.4))
    return module.eval()


class OwnAttention(nn.Module):
    """Calls the operator by its name, so that queries may come from elsewhere than keys."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = attention()

    def forward(self, x: Tensor, y: Tensor, need_weights: bool = False) -> Tensor:
        m = self.maps
        given = (m.in_proj_weight, m.in_proj_bias, m.out_proj.weight, m.out_proj.bias)
        made: Tensor = torch._native_multi_head_attention(x, y, y, E, H, *given, need_weights=need_weights)[0]
        return made


class Given(nn.Module):
    """A module with what it is called with beside its input."""

    def __init__(self, module: nn.Module, **beside: Any) -> None:
        super().__init__()
        self.module, self.beside = module, beside

    def forward(self, x: Tensor) -> Any:
        if isinstance(self.module, nn.MultiheadAttention):
            return self.module(x, x, x, **self.beside)
        return self.module(x, **self.beside)


class Nothing(TorchDispatchMode):
    """A mode of the user's own, which keeps a list of what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def rebuilding() -> Iterator[None]:
    """Another mode is on, which keeps the native call from being opened."""
    with Nothing():
        yield


CASES: dict[str, Callable[[], nn.Module]] = {
    "weights": lambda: Given(attention()),
    "weights, not averaged": lambda: Given(attention(), average_attn_weights=False),
    "output": lambda: Given(attention(), need_weights=False),
    "padding": lambda: Given(attention(), need_weights=False, key_padding_mask=PADDING),
    "later": lambda: Given(attention(), attn_mask=LATER),
    "both": lambda: Given(attention(), attn_mask=LATER, key_padding_mask=PADDING),
    "layer": lambda: Given(layer()),
    "layer, norm first": lambda: Given(layer(norm_first=True, activation="gelu")),
    "layer, padding": lambda: Given(layer(), src_key_padding_mask=PADDING),
    "layer, later": lambda: Given(layer(), src_mask=LATER),
}


def parts(model: Any, x: Tensor) -> dict[str, Tensor]:
    """q before its scale, k, v, weights and output of the operator's own kernels, run one by one."""
    inner = model.module
    attn = inner if isinstance(inner, nn.MultiheadAttention) else inner.self_attn
    if getattr(inner, "norm_first", False):
        x = inner.norm1(x)
    scaled, k, v = torch._transform_bias_rescale_qkv(F.linear(x, attn.in_proj_weight), attn.in_proj_bias, H)
    q = F.linear(x, attn.in_proj_weight[:E], attn.in_proj_bias[:E]).view(B, T, H, D).transpose(1, 2)
    scores = torch.bmm(scaled.reshape(B * H, T, D), k.reshape(B * H, T, D).transpose(1, 2)).view(B, H, T, T)
    given = {**model.beside}
    padding = given.get("key_padding_mask", given.get("src_key_padding_mask"))
    later = given.get("attn_mask", given.get("src_mask"))
    mask = torch.zeros(B, 1, T, T, dtype=torch.bool)
    mask = mask | padding[:, None, None] if padding is not None else mask
    mask = mask | later if later is not None else mask
    weights = scores.masked_fill(mask, -torch.inf).softmax(-1)
    output = torch.bmm(weights.view(B * H, T, T), v.reshape(B * H, T, D)).view(B, H, T, D)
    return {"q": q, "k": k, "v": v, "weights": weights, "output": output}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_what_the_kernel_itself_made(case: str, guard: Any) -> None:
    model, x = CASES[case](), draw(B, T, E, seed=50)
    with guard():
        expected = model(x)
        with hookattn.tracing(model) as trace:
            returned = model(x)
        made = parts(model, x)
    assert [(c.tap, list(c.notes)) for c in trace.calls] == [("mha_fast_path", [])]
    call = trace[0]
    for name in ("k", "v"):
        assert_same_values(call.get(name), made[name], name)
    for name in ("q", "weights", "output"):
        assert_close(call.get(name), made[name], 1e-6, name)
    _, weights, output = reference_attention(made["q"], made["k"], made["v"], scale=D**-0.5, mask=call.mask)
    assert_close(call.weights, weights, 1e-6, "weights")
    assert_close(call.output, output, 1e-6, "output")
    assert call.scale == D**-0.5 and call.certificate.faithful
    assert call.certificate.basis != "what the fused layer returned"
    if case == "weights, not averaged":
        assert_same_values(call.weights, expected[1], "the weights that the module returns")
    assert call.site.path == ("module.self_attn" if "layer" in case else "module")
    real, got = (y[0] if isinstance(y, tuple) else y for y in (expected, returned))
    assert_same_values(got, real, "the model's own output")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_is_returned_is_as_it_was(case: str, guard: Any) -> None:
    """No view that it was not, no version more, in no graph more."""
    model, x = CASES[case](), draw(B, T, E, seed=51)
    if guard is torch.enable_grad:
        model.requires_grad_(False)

    def about(y: Tensor) -> tuple[Any, ...]:
        version = None if y.is_inference() else y._version
        return y._is_view(), version, y.requires_grad, y.grad_fn, y.is_inference(), y.stride(), y.storage_offset()

    with guard():
        real = model(x)
        with hookattn.tracing(model) as trace:
            got = model(x)
    assert len(trace.calls) == 1
    for one, other in zip(*(y if isinstance(y, tuple) else (y,) for y in (real, got)), strict=True):
        if one is not None:
            assert about(one) == about(other)
            assert_same_values(other, one, "what is returned")
            with guard():
                other.add_(1)


@pytest.mark.parametrize("case", CASES)
def test_writing_to_what_it_returned_leaves_the_record(case: str) -> None:
    model, x = CASES[case](), draw(B, T, E, seed=52)
    with torch.no_grad(), hookattn.tracing(model) as trace:
        made = model(x)
        before = {name: trace[0].get(name).clone() for name in ("q", "k", "v", "weights", "output")}
        for y in made if isinstance(made, tuple) else (made,):
            if y is not None:
                y.zero_()
        x.zero_()
    for name, value in before.items():
        assert_same_values(trace[0].get(name), value, name)


@pytest.mark.parametrize("case", CASES)
def test_beside_another_mode_it_is_rebuilt(case: str) -> None:
    """The user's mode sees one operator, as it does without a trace, and the record is the same to rounding."""
    model, x = CASES[case](), draw(B, T, E, seed=53)
    with torch.no_grad():
        opened = hookattn.trace(model, (x,))[0]
        with Nothing() as untraced:
            model(x)
        with Nothing() as mode:
            rebuilt = hookattn.trace(model, (x,))[0]
    native = [name for name in untraced.seen if "native_multi" in name or "layer_fwd" in name]
    assert native and [name for name in mode.seen if name in native] == native
    assert not [name for name in mode.seen if "transform_bias" in name]
    assert rebuilt.notes and rebuilt.certificate.basis == "what the fused layer returned"
    assert rebuilt.certificate.faithful and rebuilt.site == opened.site and rebuilt.scale == opened.scale
    for name in ("q", "k", "v", "weights", "output"):
        assert_close(rebuilt.get(name), opened.get(name), 1e-5, name)


def test_a_wrong_rebuild_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = CASES["weights"](), draw(B, T, E, seed=54)
    monkeypatch.setattr(native_layers, "softmax_weights", lambda s, mask: torch.ones_like(s) / s.shape[-1])
    with torch.no_grad(), rebuilding():
        assert hookattn.trace(model, (x,))[0].certificate.status == "unfaithful"


@pytest.mark.parametrize("field", ["q", "k", "v", "weights", "output"])
def test_a_wrong_reading_is_told(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call_of = native_layers._Inside.call

    def wrong(self: Any, mask: Tensor | None) -> Any:
        call = call_of(self, mask)
        assert call is not None
        setattr(call, field, getattr(call, field).roll(1, -1))
        return call

    monkeypatch.setattr(native_layers._Inside, "call", wrong)
    with torch.no_grad():
        assert hookattn.trace(CASES["layer"](), (draw(B, T, E, seed=55),))[0].certificate.status == "unfaithful"


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("around", [torch.no_grad, rebuilding])
def test_queries_from_elsewhere(need_weights: bool, around: Any) -> None:
    model, x, y = OwnAttention(), draw(B, T, E, seed=56), draw(B, T, E, seed=57)
    with torch.no_grad(), around():
        trace = hookattn.trace(model, (x, y, need_weights))
    attn = copy.deepcopy(model.maps).double()
    w, b = attn.in_proj_weight.split(E), attn.in_proj_bias.split(E)
    q, k, v = (F.linear(z.double(), w[i], b[i]).unflatten(-1, (H, D)).transpose(1, 2) for i, z in enumerate((x, y, y)))
    _, weights, output = reference_attention(q, k, v, scale=D**-0.5)
    (call,) = trace.calls
    assert call.certificate.faithful
    for name, expected in {"q": q, "k": k, "v": v, "weights": weights, "output": output}.items():
        assert_close(call.get(name), expected, 1e-5, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["output", "layer", "layer, padding"])
def test_dtypes(case: str, dtype: torch.dtype) -> None:
    model, x = CASES[case]().to(dtype), draw(B, T, E, seed=58).to(dtype)
    with torch.no_grad():
        call = hookattn.trace(model, (x,))[0]
    assert call.dtype == call.weights.dtype == dtype and call.certificate.faithful and not call.notes
    _, weights, output = reference_attention(call.q, call.k, call.v, scale=call.scale, mask=call.mask)
    assert_close(call.weights, weights, 1e-12 if dtype == torch.float64 else 2e-2, "weights")
    assert_close(call.output, output, 1e-12 if dtype == torch.float64 else 3e-2, "output")


def test_rows_that_may_see_nothing() -> None:
    """The kernel's own values, which are not numbers, and a record that says which rows those are."""
    padding = torch.tensor([[False] * T, [True] * T])
    model, x = Given(attention(), need_weights=False, key_padding_mask=padding), draw(B, T, E, seed=59)
    with torch.no_grad():
        real = model(x)[0]
        call = hookattn.trace(model, (x,))[0]
    assert call.mask is not None and not call.mask[1].any() and call.mask[0].all()
    assert_same_values(call.output[1].isnan().any().view(1), real[1].isnan().any().view(1), "nan")
    assert call.certificate.faithful
    assert torch.isfinite(call.weights[0]).all()


def test_a_fused_kernel_inside_a_native_layer_is_read() -> None:
    """A GPU's native layer calls one; here the same operator of the CPU is called as it would be."""
    from hookattn.taps.native_layers import _Inside, _seen
    from tests.reference import draw

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert _seen()[fused] is _Inside.fused
    q, k, v = (draw(2, 3, 5, 8, seed=i) for i in range(3))
    for options, scale in (({}, 8**-0.5), ({"scale": 0.3}, 0.3)):
        inside = _Inside("cpu")
        with inside:
            made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, **options)
        call = inside.call(None)
        assert call is not None and call.scale == scale
        assert call.q is q and call.k is k and call.v is v and call.output is not None
        assert torch.equal(call.output, made[0])
        expected = (q.double() @ k.double().mT * scale).softmax(-1) @ v.double()
        torch.testing.assert_close(call.output.double(), expected, rtol=0, atol=1e-5)
