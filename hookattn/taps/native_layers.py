"""The native calls that torch's attention modules are on their eval fast path: one operator from input to output.

The operator is left to run, so that the outputs stay bit-identical. It is made of other operators, which a dispatch
mode sees once the operator's own kernel is run with the mode still on: keys, values, weights and output are then the
tensors that the kernel itself made, and nothing is computed twice. Where that is not to be had (nested tensors, another
dispatch mode, a device whose kernel is made otherwise), the attention is rebuilt from the layer's own input and
weights, and its certificate compares the rebuilt result of the whole native call with the real one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn import Parameter

from ..attention.functional import dot_scores, softmax_weights, weighted_values
from ..attention.kernel_call import KernelCall
from ..torch_internals.dispatch_modes import TorchDispatchMode, dispatch_modes, has_own_kernel, opened, run_kernel
from ..torch_internals.isolation import no_gradients

if TYPE_CHECKING:
    from .eager.follower import Follower

NAME = "mha_fast_path"
_NOTE = "q, k, v rebuilt from the layer's input: the native fast path never hands them out"


class _Inside(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what one native call is made of, and runs it.

    Attributes:
        device: the type of device it runs on.
        q: B H T D, before the kernel's own scale.
        k, v: B H T D.
        weights: B H T T.
        output: B H T D, the weighted values before they are merged.
        scale: the factor of q·k.
    """

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.q: Tensor | None = None
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.weights: Tensor | None = None
        self.output: Tensor | None = None
        self.scale = 1.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would wrap what follows, so that compiling skips it, for more than each operator takes here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        see = _seen().get(func)
        return func(*args, **(kwargs or {})) if see is None else see(self, func, args, kwargs or {})

    def opened(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """An operator that is made of others: its own kernel runs with this mode on for what it calls."""
        with opened(self):
            return run_kernel(func, self.device, *args, **kwargs)

    def transformed(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """q, k and v get their bias, q its scale. Of q the kernel keeps the scaled one alone and writes over it."""
        made = func(*args, **kwargs)
        projected, bias, heads = args
        width = projected.shape[-1] // 3
        self.q = (projected[..., :width] + bias[:width]).unflatten(-1, (heads, width // heads)).transpose(1, 2)
        self.scale = (width // heads) ** -0.5
        _, self.k, self.v = made
        return made

    def normalized(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The softmax, masked or not."""
        self.weights = made = func(*args, **kwargs)
        return made

    def multiplied(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A product of matrices: after the softmax, that with the values."""
        made = func(*args, **kwargs)
        if self.weights is not None and self.output is None:
            self.output = made
        return made

    def fused(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One of the kernels of scaled_dot_product_attention, where the call is made with one; B H T D all."""
        made = func(*args, **kwargs)
        self.q, self.k, self.v = args[:3]
        self.output = made[0]
        scale = kwargs.get("scale")
        self.scale = self.q.shape[-1] ** -0.5 if scale is None else scale
        return made

    def call(self, mask: Tensor | None) -> KernelCall | None:
        """What was seen, if that is a whole call."""
        q, k, v, output = self.q, self.k, self.v, self.output
        if q is None or k is None or v is None or output is None:
            return None
        output = output.reshape(q.shape[:3] + v.shape[3:]) if output.dim() == 3 else output
        shapes = q.shape[:3] + k.shape[2:3]
        if (self.weights is not None and self.weights.shape != shapes) or output.shape != q.shape[:3] + v.shape[3:]:
            return None
        return KernelCall(q, k, v, output, self.scale, NAME, mask=mask, weights=self.weights)


_Rule = Callable[[_Inside, Any, Sequence[Any], dict[str, Any]], Any]


@functools.cache
def _seen() -> dict[Any, _Rule]:
    """What is looked at, by operator, as far as this torch has it."""
    rules: dict[str, _Rule] = {
        "_transformer_encoder_layer_fwd.default": _Inside.opened,
        "_native_multi_head_attention.default": _Inside.opened,
        "_transform_bias_rescale_qkv.default": _Inside.transformed,
        "_softmax.default": _Inside.normalized,
        "_softmax.out": _Inside.normalized,
        "_masked_softmax.default": _Inside.normalized,
        "bmm.default": _Inside.multiplied,
        "bmm.out": _Inside.multiplied,
        "baddbmm.default": _Inside.multiplied,
        "_scaled_dot_product_flash_attention.default": _Inside.fused,
        "_scaled_dot_product_flash_attention_for_cpu.default": _Inside.fused,
        "_scaled_dot_product_efficient_attention.default": _Inside.fused,
        "_scaled_dot_product_cudnn_attention.default": _Inside.fused,
    }
    found: dict[Any, _Rule] = {}
    for name, rule in rules.items():
        packet, overload = name.split(".")
        if (operator := getattr(getattr(torch.ops.aten, packet, None), overload, None)) is not None:
            found[operator] = rule
    return found


def _run(watch: Follower, operator: str, func: Any, given: dict[str, Any], x: Tensor, within: str) -> tuple[Any, bool]:
    """Run a native call; what it returned, and whether its attention was seen inside and is recorded."""
    if not _can_be_opened(operator, x, given.values()):
        return func(**given), False
    inside = _Inside(x.device.type)
    with opened(inside):
        out = func(**given)
    call = inside.call(_mask(given.get("mask"), given.get("mask_type"), *x.shape[:2]))
    if call is None:
        return out, False
    call.within = within
    watch.recorder.record(call)
    return out, True


def _can_be_opened(operator: str, x: Tensor, given: Iterable[Any]) -> bool:
    """Whether nothing but the plain kernel of this device would run, which another mode would be shown in pieces."""
    return (
        x.device.type in ("cpu", "cuda")
        and not x.is_nested
        and dispatch_modes() == 0
        and all(type(g) in (Tensor, Parameter) for g in given if isinstance(g, Tensor))
        and has_own_kernel(getattr(torch.ops.aten, operator).default, x.device.type)
    )


_ATTENTION = (
    "query",
    "key",
    "value",
    "embed_dim",
    "num_head",
    "qkv_weight",
    "qkv_bias",
    "proj_weight",
    "proj_bias",
    "mask",
    "need_weights",
    "average_attn_weights",
    "mask_type",
)


def handle_native(watch: Follower, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``torch._native_multi_head_attention``: the fast path of one MultiheadAttention."""
    given = {**dict(zip(_ATTENTION, args, strict=False)), **kwargs}
    out, seen = _run(watch, "_native_multi_head_attention", func, given, given["query"], "")
    if not seen:
        with no_gradients():
            report(
                watch,
                given["query"],
                given,
                lambda merged: F.linear(merged, given["proj_weight"], given["proj_bias"]),
                out[0],
            )
    return out


_LAYER = (
    "src",
    "embed_dim",
    "num_heads",
    "qkv_weight",
    "qkv_bias",
    "proj_weight",
    "proj_bias",
    "use_gelu",
    "norm_first",
    "eps",
    "norm_weight_1",
    "norm_bias_1",
    "norm_weight_2",
    "norm_bias_2",
    "ffn_weight_1",
    "ffn_bias_1",
    "ffn_weight_2",
    "ffn_bias_2",
    "mask",
    "mask_type",
)


def handle_layer(watch: Follower, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``torch._transformer_encoder_layer_fwd``: the fast path of one TransformerEncoderLayer."""
    g: dict[str, Any] = {**dict(zip(_LAYER, args, strict=False)), **kwargs}
    out, seen = _run(watch, "_transformer_encoder_layer_fwd", func, g, g["src"], "self_attn")
    if seen:
        return out
    g["num_head"] = g["num_heads"]
    shape = (g["embed_dim"],)

    def norm(x: Tensor, which: int) -> Tensor:
        return F.layer_norm(x, shape, g[f"norm_weight_{which}"], g[f"norm_bias_{which}"], g["eps"])

    def feed(x: Tensor) -> Tensor:
        hidden = F.linear(x, g["ffn_weight_1"], g["ffn_bias_1"])
        hidden = F.gelu(hidden) if g["use_gelu"] else F.relu(hidden)
        return F.linear(hidden, g["ffn_weight_2"], g["ffn_bias_2"])

    with no_gradients():
        src, _ = dense(g["src"])
        x = norm(src, 1) if g["norm_first"] else src

        def rest(merged: Tensor) -> Tensor:
            attended = src + F.linear(merged, g["proj_weight"], g["proj_bias"])
            if g["norm_first"]:
                return attended + feed(norm(attended, 2))
            attended = norm(attended, 1)
            return norm(attended + feed(attended), 2)

        report(watch, x, g, rest, out, nested=g["src"] if g["src"].is_nested else None, within="self_attn")
    return out


def dense(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A nested tensor padded, with its B S mask of real entries; any other as it is."""
    if not x.is_nested:
        return x, None
    lengths = torch.tensor([part.shape[0] for part in x.unbind()], device=x.device)
    padded = torch.nested.to_padded_tensor(x, 0.0)
    return padded, torch.arange(padded.shape[1], device=x.device) < lengths.unsqueeze(1)


def report(
    watch: Follower,
    x: Tensor,
    given: dict[str, Any],
    rest: Any,
    out: Tensor,
    nested: Tensor | None = None,
    within: str = "",
) -> None:
    """Rebuild the attention of a native call from its input and record it.

    Args:
        x: B T C, the input of the projections (or nested).
        given: the native call's arguments.
        rest: merged heads B T C -> what the native call returns.
        out: what it returned.
        nested: the nested tensor ``x`` was padded from.
        within: the child of the running module that holds the attention.
    """
    kept: Tensor | None = None
    if nested is not None:
        _, kept = dense(nested)
    elif x.is_nested:
        x, kept = dense(x)
    b, t, c = x.shape
    heads = int(given["num_head"])
    weight, bias = given["qkv_weight"].split(c), given["qkv_bias"].split(c)
    read = (x, x, x) if "src" in given else (x, given["key"], given["value"])
    q, k, v = (
        rearrange(F.linear(dense(y)[0], *maps), "b s (h d) -> b h s d", h=heads)
        for y, *maps in zip(read, weight, bias, strict=True)
    )
    mask = _mask(given.get("mask"), given.get("mask_type"), b, t)
    if kept is not None:
        mask = kept.view(b, 1, 1, t)
    scale = (c // heads) ** -0.5
    weights = softmax_weights(dot_scores(q, k, scale), mask)
    output = weighted_values(weights, v).to(q.dtype)
    rebuilt = rest(rearrange(output, "b h t d -> b t (h d)"))
    real, _ = dense(out)
    rows = torch.ones(b, t, dtype=torch.bool, device=x.device) if kept is None else kept
    if mask is not None:
        rows = rows & mask.any(-1).all(1).expand(b, t)
    error = torch.where(rows.unsqueeze(-1), rebuilt - real, 0.0).abs().amax()
    watch.recorder.record(
        KernelCall(
            q=q,
            k=k,
            v=v,
            output=output,
            scale=scale,
            mask=mask,
            tap=NAME,
            notes=[_NOTE],
            outer_error=error,
            within=within,
        )
    )


def _mask(mask: Tensor | None, kind: int | None, b: int, t: int) -> Tensor | None:
    """The native call's mask (True = masked; 0 attention, 1 key padding, 2 both) as True = may attend, B H T S."""
    if mask is None:
        return None
    if mask.dim() == 2:
        return ~mask.bool().view((1, 1, t, t) if kind == 0 else (b, 1, 1, t))
    if mask.dim() == 3:
        return ~mask.bool().unsqueeze(1)
    return ~mask.bool()
