"""What every test compares with: attention as explicit math in float64, and the promise that tracing changes nothing.

Nothing in this file imports hookattn; a call is read through the field names of the contract alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex_module
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

FIELDS = ("q", "k", "v", "bias", "scores", "mask", "sinks", "weights", "output")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}


# ---------------------------------------------------------------------------------------------------- the math


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """B G S D -> B H S D: head h reads key head h // (H // G)."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def as_sinks(sinks: Tensor, like: Tensor) -> Tensor:
    """Sinks of shape H, or broadcastable to B H T 1, as B H T 1."""
    sinks = sinks.double()
    if sinks.dim() == 1:
        sinks = sinks.view(1, -1, 1, 1)
    return sinks.expand(*like.shape[:3], 1)


def masked_softmax(scores: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
    """softmax over S of scores where mask, else -inf; sinks join and are dropped; 0 where nothing may be attended."""
    scores = scores.double()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, as_sinks(sinks, scores)], dim=-1)
    top = scores.amax(dim=-1, keepdim=True)
    top = torch.where(top == -math.inf, torch.zeros_like(top), top)
    mass = torch.exp(scores - top)
    total = mass.sum(dim=-1, keepdim=True)
    weights = torch.where(total > 0, mass / total.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(mass))
    return weights[..., :-1] if sinks is not None else weights


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, weights, output) in float64 for q B H T D, k B G S D, v B G S E."""
    assert q.dim() == k.dim() == v.dim() == 4, (q.shape, k.shape, v.shape)
    heads = q.shape[1]
    q, k, v = q.double(), repeat_heads(k.double(), heads), repeat_heads(v.double(), heads)
    scores = (q.unsqueeze(3) * k.unsqueeze(2)).sum(dim=-1)
    scores = scores * (scale.double() if isinstance(scale, Tensor) else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    weights = masked_softmax(scores, mask, sinks)
    return scores, weights, weights @ v


# --------------------------------------------------------------------------------------------- one captured call


def allowed_rows(mask: Tensor | None, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """B H T: the query rows that have something to attend to."""
    if mask is None:
        return torch.ones(tuple(shape[:3]), dtype=torch.bool)
    return mask.expand(tuple(shape)).any(dim=-1)


def assert_close(actual: Tensor, expected: Tensor, tol: float, what: str) -> None:
    """Every element within tol absolute plus tol relative, both sides in float64."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    a, e = actual.double(), expected.double()
    bad = ~((a - e).abs() <= tol + tol * e.abs())
    if bool(bad.any()):
        worst = (a - e)[bad].abs().max().item()
        where = bad.nonzero()[0].tolist()
        raise AssertionError(f"{what}: {int(bad.sum())} of {bad.numel()} differ, worst {worst:.3g}, first at {where}")


def assert_same_values(actual: Tensor, expected: Tensor, what: str) -> None:
    """Bit for bit: dtype, shape and every element."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    if not same_bits(actual, expected):
        worst = (actual.double() - expected.double()).abs().max().item()
        raise AssertionError(f"{what}: not the model's own bits (largest difference {worst:.3g})")


def check_call(
    call: Any,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    output: Tensor | None = None,
    weights: Tensor | None = None,
    tol: float | None = None,
    exact: bool = True,
    masked_scores: bool = True,
    rows: Tensor | None = None,
    keys: Tensor | None = None,
    dropout: float = 0.0,
    faithful: bool = True,
) -> None:
    """Compare every field of a captured call with the reference, and check the invariants of the contract.

    ``exact``: q, k and v are the model's own tensors and have to match bit for bit.
    ``output``, ``weights``: the model's own, bit for bit, where the test has them; else the reference decides.
    ``masked_scores``: scores are comparable at masked positions too (not so where bias and mask arrive summed).
    ``rows``, ``keys``: broadcastable to B H T and B S, the positions whose content means anything.
    """
    tol = TOLERANCE[q.dtype] if tol is None else tol
    batch, heads, n_q, _ = q.shape
    n_k = k.shape[2]
    shape = (batch, heads, n_q, n_k)
    row = torch.ones(shape[:3], dtype=torch.bool) if rows is None else rows.expand(shape[:3])

    for name, expected in (("q", q), ("k", k), ("v", v)):
        actual, expected = getattr(call, name), expected.detach()
        if exact:
            assert_same_values(actual, expected, name)
            continue
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        if name == "q":
            assert_close(actual[row], expected[row], tol, name)
        else:
            held = torch.ones(batch, n_k, dtype=torch.bool) if keys is None else keys.expand(batch, n_k)
            assert_close(actual.transpose(1, 2)[held], expected.transpose(1, 2)[held], tol, name)

    # mask: always a bool tensor, broadcastable to B H T S
    assert isinstance(call.mask, Tensor) and call.mask.dtype == torch.bool, f"mask: {call.mask!r}"
    got_mask = call.mask.expand(shape)
    want_mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
    assert torch.equal(got_mask[row], want_mask[row]), "mask"

    # scalars
    if not isinstance(scale, Tensor):
        assert call.scale is not None and abs(float(call.scale) - scale) <= 1e-6 * abs(scale), f"scale {call.scale}"
    if softcap is None:
        assert not call.softcap, f"softcap {call.softcap}, expected none"
    else:
        assert abs(float(call.softcap) - softcap) <= 1e-6 * softcap, f"softcap {call.softcap}"
    assert abs(float(call.dropout or 0.0) - dropout) < 1e-6, f"dropout {call.dropout}, expected {dropout}"

    # bias: finite additive terms, or None
    seen = want_mask & row.unsqueeze(-1)
    if bias is None:
        assert call.bias is None, "bias: expected None"
    else:
        assert isinstance(call.bias, Tensor), f"bias: {call.bias!r}"
        got_bias = call.bias.expand(shape)
        assert bool(got_bias.isfinite().all()), "bias: not finite"
        assert_close(got_bias[seen], bias.detach().expand(shape)[seen], max(tol, 1e-6), "bias")

    # sinks
    if sinks is None:
        assert call.sinks is None, "sinks: expected None"
    else:
        like = torch.empty(shape)
        assert isinstance(call.sinks, Tensor), f"sinks: {call.sinks!r}"
        assert_close(as_sinks(call.sinks, like), as_sinks(sinks.detach(), like), tol, "sinks")

    # scores, weights and output against the reference, from the model's own q, k and v
    ref_scores, ref_weights, ref_output = reference_attention(
        q.detach(), k.detach(), v.detach(), scale=scale, bias=bias, mask=mask, softcap=softcap, sinks=sinks
    )
    assert tuple(call.scores.shape) == shape, f"scores: shape {tuple(call.scores.shape)}, expected {shape}"
    assert bool(call.scores[row].isfinite().all()), "scores: not finite"
    compared = row.unsqueeze(-1).expand(shape) if masked_scores else seen
    assert_close(call.scores[compared], ref_scores.detach()[compared], 2 * tol, "scores")

    filled = allowed_rows(want_mask, shape) & row
    if sinks is not None:
        filled = row
    assert tuple(call.weights.shape) == shape, f"weights: shape {tuple(call.weights.shape)}, expected {shape}"
    assert_close(call.weights[filled], ref_weights.detach()[filled], tol, "weights")
    if weights is not None:
        assert_same_values(call.weights.to(weights.dtype), weights.detach(), "weights")

    assert call.output.shape == ref_output.shape, f"output: shape {tuple(call.output.shape)}"
    if not dropout:
        assert_close(call.output[filled], ref_output.detach()[filled], 2 * tol, "output")
    if output is not None:
        assert_same_values(call.output, output.detach(), "output")

    check_invariants(call, tol=tol, rows=filled, dropout=dropout, faithful=faithful)


def check_invariants(
    call: Any, *, tol: float, rows: Tensor | None = None, dropout: float = 0.0, faithful: bool = True
) -> None:
    """What section 1 of the contract promises of any call, from the call's own fields alone."""
    shape = call.weights.shape
    mask = call.mask.expand(shape)
    if rows is None:
        rows = allowed_rows(mask, shape) if call.sinks is None else torch.ones(shape[:3], dtype=torch.bool)
    again = masked_softmax(call.scores, mask, call.sinks)
    assert_close(call.weights[rows], again[rows], tol, "softmax(where(mask, scores, -inf), sinks) == weights")
    if not dropout:
        rebuilt = call.weights.double() @ repeat_heads(call.v.double(), shape[1])
        assert_close(rebuilt[rows], call.output[rows], 2 * tol, "weights @ repeat(v) == output")
    outside = ~mask & rows.unsqueeze(-1)
    if bool(outside.any()):
        assert call.weights[outside].abs().max().item() <= 1e-30, "a masked entry weighs 0"
    for name in FIELDS:
        value = getattr(call, name)
        if isinstance(value, Tensor):
            assert not value.requires_grad, f"{name} is not detached"
    assert isinstance(call.dtype, torch.dtype), f"dtype {call.dtype!r}"
    assert call.q.dtype == call.dtype, f"dtype {call.dtype}, q is {call.q.dtype}"
    assert isinstance(call.tap, str) and call.tap, f"tap {call.tap!r}"
    if faithful:
        assert call.certificate.faithful is True, f"certificate: {call.certificate}"
        error = call.certificate.max_error
        assert error is None or error >= 0.0 or math.isnan(error), f"certificate: {call.certificate}"


# ------------------------------------------------------------------------------------- tracing changes nothing

_WATCHED: tuple[tuple[Any, str], ...] = (
    (torch, "matmul bmm baddbmm einsum softmax where exp log_softmax logsumexp cat dropout tanh add mul div compile"),
    (torch, "_native_multi_head_attention _transformer_encoder_layer_fwd"),
    (F, "scaled_dot_product_attention multi_head_attention_forward softmax log_softmax dropout dropout_ linear"),
    (F, "has_torch_function handle_torch_function _in_projection_packed _in_projection"),
    (torch.overrides, "has_torch_function handle_torch_function has_torch_function_unary"),
    (torch.Tensor, "__matmul__ matmul bmm baddbmm softmax log_softmax masked_fill masked_fill_ __setitem__ add_ exp"),
    (torch.Tensor, "__torch_function__ view transpose where"),
    (flex_module, "flex_attention create_block_mask flex_attention_hop BlockMask"),
    (nn.Module, "__call__ _call_impl _wrapped_call_impl __getattr__ __setattr__ forward"),
    (nn.MultiheadAttention, "forward __call__"),
    (nn.TransformerEncoderLayer, "forward _sa_block __call__"),
    (nn.TransformerEncoder, "forward __call__"),
    (nn.TransformerDecoderLayer, "forward _sa_block _mha_block __call__"),
    (nn.Softmax, "forward"),
    (nn.Dropout, "forward"),
)


@dataclasses.dataclass
class Snapshot:
    """Everything a trace could leave behind on a model or in torch, as it was before."""

    modules: dict[str, tuple[nn.Module, type, dict[str, Any]]]
    tensors: dict[str, tuple[Tensor, Tensor, bool]]
    torch_state: dict[str, Any]


def _torch_state() -> dict[str, Any]:
    state: dict[str, Any] = {}
    for owner, names in _WATCHED:
        label = getattr(owner, "__name__", repr(owner))
        for name in names.split():
            value = inspect.getattr_static(owner, name, None)
            state[f"{label}.{name}"] = value
            plain = getattr(value, "__func__", value)
            for part in ("__code__", "__defaults__", "__kwdefaults__"):
                state[f"{label}.{name}.{part}"] = getattr(plain, part, None)
    state["function modes"] = torch._C._len_torch_function_stack()
    state["dispatch modes"] = len(_get_current_dispatch_mode_stack())
    state["grad mode"] = torch.is_grad_enabled()
    state["inference mode"] = torch.is_inference_mode_enabled()
    state["mha fast path"] = torch.backends.mha.get_fastpath_enabled()
    state["deterministic"] = torch.are_deterministic_algorithms_enabled()
    state["default dtype"] = torch.get_default_dtype()
    state["sdp backends"] = (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )
    for name in sorted(vars(torch.nn.modules.module)):
        if name.startswith("_global_") and name.endswith("hooks"):
            state[name] = len(vars(torch.nn.modules.module)[name])
    return state


def _shallow(value: Any) -> Any:
    """A copy of the containers a module keeps, so that a hook or an attribute added later shows."""
    return dict(value) if isinstance(value, dict) else value


def snapshot(model: nn.Module) -> Snapshot:
    """The state that :func:`assert_untouched` compares with."""
    modules = {
        path: (module, type(module), {key: _shallow(value) for key, value in vars(module).items()})
        for path, module in model.named_modules(remove_duplicate=False)
    }
    named = list(model.named_parameters(remove_duplicate=False)) + list(model.named_buffers(remove_duplicate=False))
    tensors = {name: (tensor, tensor.detach().clone(), tensor.requires_grad) for name, tensor in named}
    return Snapshot(modules, tensors, _torch_state())


def _differ(left: Any, right: Any) -> bool:
    """Whether an attribute is another object now; small values are compared, everything else by identity."""
    if left is right or (type(left).__name__ == "builtin_function_or_method" and left == right):
        return False
    if isinstance(left, (bool, int, float, str, tuple, torch.dtype)) and type(left) is type(right):
        return bool(left != right)
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) != list(right) or any(_differ(left[key], right[key]) for key in left)
    return True


def assert_untouched(model: nn.Module, before: Snapshot | None = None, *, buffers: bool = True) -> None:
    """No hook, attribute, patch or mode is left; with ``before``, nothing at all has changed since.

    ``buffers=False``: the model writes to its own buffers in its forward (a cache), so their content may differ.
    """
    assert torch._C._len_torch_function_stack() == 0, "a torch function mode is still on the stack"
    assert not _get_current_dispatch_mode_stack(), "a torch dispatch mode is still on the stack"
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention, "F.sdpa is patched"
    assert torch.overrides.has_torch_function is torch._C._has_torch_function, "has_torch_function is patched"
    assert F.has_torch_function is torch.overrides.has_torch_function, "F.has_torch_function is patched"
    for function, home in (
        (flex_module.flex_attention, "flex_attention.py"),
        (F.multi_head_attention_forward, "functional.py"),
        (nn.MultiheadAttention.forward, "activation.py"),
        (nn.TransformerEncoderLayer.forward, "transformer.py"),
    ):
        assert function.__code__.co_filename.endswith(home), f"{function.__qualname__}: its code is not torch's own"
    for path, module in model.named_modules():
        for name in sorted(vars(module)):
            if "hooks" in name and not name.startswith("_load") and not name.startswith("_state"):
                kept = before.modules[path][2].get(name) if before is not None and path in before.modules else {}
                assert len(vars(module)[name] or ()) == len(kept or ()), f"{path or 'model'}: {name} is not empty"
        has_own = before is not None and path in before.modules and "forward" in before.modules[path][2]
        assert has_own or "forward" not in vars(module), f"{path or 'model'}: forward is patched on the instance"
    if before is None:
        return

    now = _torch_state()
    for name, value in before.torch_state.items():
        assert name in now and not _differ(value, now[name]), f"changed by the trace: {name}"
    seen = dict(model.named_modules(remove_duplicate=False))
    assert list(seen) == list(before.modules), "modules were added or removed"
    for path, (module, kind, attributes) in before.modules.items():
        label = path or "model"
        assert seen[path] is module and type(module) is kind, f"{label}: another module or class"
        added = set(vars(module)) ^ set(attributes)
        assert not added, f"{label}: attributes added or removed: {sorted(added)}"
        for name, value in attributes.items():
            assert not _differ(value, _shallow(vars(module)[name])), f"{label}.{name} changed"
    named = list(model.named_parameters(remove_duplicate=False)) + list(model.named_buffers(remove_duplicate=False))
    assert [name for name, _ in named] == list(before.tensors), "parameters or buffers were added or removed"
    for name, tensor in named:
        same, data, requires_grad = before.tensors[name]
        assert tensor is same and tensor.requires_grad == requires_grad, f"{name} changed"
        assert not buffers or same_bits(tensor.detach(), data), f"{name}: its values changed"


def same_bits(left: Any, right: Any) -> bool:
    """Equal in structure, dtype and every bit that counts (a NaN equals a NaN in the same place)."""
    if isinstance(left, Tensor):
        if not isinstance(right, Tensor) or left.is_nested != right.is_nested:
            return False
        if left.is_nested:
            return all(same_bits(a, b) for a, b in zip(left.unbind(), right.unbind(), strict=True))
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        if torch.equal(left, right):
            return True
        return bool(left.is_floating_point() and ((left == right) | (left.isnan() & right.isnan())).all())
    if isinstance(left, dict):
        return list(left) == list(right) and all(same_bits(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same_bits(a, b) for a, b in zip(left, right, strict=True))
    if dataclasses.is_dataclass(left) and not isinstance(left, type):
        names = [field.name for field in dataclasses.fields(left)]
        return type(left) is type(right) and all(same_bits(getattr(left, n), getattr(right, n)) for n in names)
    return bool(left == right)


def run(model: nn.Module, inputs: Any) -> Any:
    """The model's own forward on what ``trace`` accepts: a tensor, a tuple or a dict."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def trace_checked(
    trace: Callable[..., Any],
    model: nn.Module,
    inputs: Any,
    *,
    seed: int = 0,
    buffers: bool = True,
    warns: bool = False,
    guesses: bool = False,
    **options: Any,
) -> Any:
    """Trace, and prove on the way that nothing changed: outputs, random state, model and torch are as without it.

    ``warns``: whether the library may warn (a part that cannot be read, a call over tolerance); ``guesses``: whether
    it has to say, once, that it guessed an axis.
    """
    torch.manual_seed(seed)
    plain = run(model, inputs)
    random_state = torch.get_rng_state()
    before = snapshot(model)
    torch.manual_seed(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = trace(model, inputs, **options)
    assert torch.equal(torch.get_rng_state(), random_state), "the trace moved the random state"
    assert same_bits(result.output, plain), "the outputs are not bit-identical with and without the trace"
    assert_untouched(model, before, buffers=buffers)
    said = [w for w in caught if w.category.__name__ == "GuessedAxesWarning"]
    assert len(said) == guesses or warns, f"{len(said)} warnings of guessed axes, expected {int(guesses)}"
    if not warns:
        theirs = [w for w in caught if w not in said]
        own = [str(w.message) for w in theirs if w.category.__module__.split(".")[0].startswith("hookattn")]
        assert not own, f"unexpected warnings: {own}"
    return result


# ------------------------------------------------------------------------------------ the model's own tensors


class Produced(TorchDispatchMode):
    """Keeps a copy of every floating tensor that an operation returned, below everything a tracer could do."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(value, Tensor) and value.is_floating_point():
                self.tensors.append(value.detach().clone())
        return result

    def holds(self, tensor: Tensor, within: float = 0.0) -> bool:
        """Whether some operation returned exactly these values (or all within a distance), in whatever layout."""
        wanted = _in_order(tensor)
        for candidate in self.tensors:
            if candidate.numel() != tensor.numel():
                continue
            found = _in_order(candidate.to(tensor.dtype))
            if same_bits(found, wanted) if not within else bool(((found - wanted).abs() <= within).all()):
                return True
        return False


def _in_order(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().double().nan_to_num(nan=1e300).sort().values


@contextlib.contextmanager
def produced(seed: int = 0) -> Iterator[Produced]:
    """Everything the model computes inside this block, without any trace."""
    torch.manual_seed(seed)
    with Produced() as probe:
        yield probe


# --------------------------------------------------------------------------------------------- small builders


def causal(n_q: int, n_k: int | None = None, offset: int = 0) -> Tensor:
    """Bool T S, True = may attend; upper-left aligned, ``offset`` keys to the left of the first query."""
    n_k = n_q if n_k is None else n_k
    return torch.ones(n_q, n_k, dtype=torch.bool).tril(offset)


def heads(x: Tensor, n: int) -> Tensor:
    """B T (H D) -> B H T D."""
    return x.view(x.shape[0], x.shape[1], n, -1).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """B H T E -> B T (H E)."""
    return x.transpose(1, 2).flatten(2)


def draw(*shape: int, seed: int = 0, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fixed random numbers, without touching the global generator."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std).to(dtype)


def alibi(n_heads: int, n_q: int, n_k: int) -> Tensor:
    """1 H T S: -slope * distance, slopes as in the paper for a power of two."""
    slopes = torch.tensor([2.0 ** (-8.0 * (i + 1) / n_heads) for i in range(n_heads)])
    distance = (torch.arange(n_q)[:, None] - torch.arange(n_k)[None, :]).abs()
    return -slopes.view(1, n_heads, 1, 1) * distance


def paths(calls: Sequence[Any]) -> list[str]:
    """The site paths in execution order."""
    return [call.site.path for call in calls]
