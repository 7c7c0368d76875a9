"""``torch.nn.MultiheadAttention`` and the ``nn.Transformer`` layers, in their Python form and on their eval fast path.

The Python form dispatches as one function and would hide its kernels: its body is run with that one check answered
"no", so that the taps of the kernels inside see them. The fast path is one native call; it is left to run, so that the
outputs stay bit-identical, and the attention in it is rebuilt from the layer's own input and weights. Its certificate
then compares the rebuilt result of the whole native call with the real one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..attention.functional import dot_scores, softmax_weights, weighted_values
from ..attention.kernel_call import KernelCall
from ..torch_internals.code_patching import Patch, copy_of
from ..torch_internals.function_modes import beneath, depth
from .active import current
from .base import Tap

if TYPE_CHECKING:
    from .eager.follower import Follower

NAME = "mha_fast_path"
_NOTE = "q, k, v rebuilt from the layer's input: the native fast path never hands them out"


def _undispatched(function: Any) -> Any:
    """The same function, with its ``has_torch_function`` answering no."""
    return copy_of(function, has_torch_function=lambda _: False) if isinstance(function, FunctionType) else function


def handle_python(watch: Follower, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run the body of ``multi_head_attention_forward`` with our mode on; every other sees the one call it would see."""
    if depth():
        with beneath(watch):
            return func(*args, **kwargs)
    with watch:
        return _undispatched(func)(*args, **kwargs)


def handle_native(watch: Follower, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``torch._native_multi_head_attention``: the fast path of one MultiheadAttention."""
    out = func(*args, **kwargs)
    names = (
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
    given = {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}
    with torch.no_grad():
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
    out = func(*args, **kwargs)
    g: dict[str, Any] = {**dict.fromkeys(_LAYER), **dict(zip(_LAYER, args, strict=False)), **kwargs}
    g["num_head"] = g["num_heads"]
    shape = (g["embed_dim"],)

    def norm(x: Tensor, which: int) -> Tensor:
        return F.layer_norm(x, shape, g[f"norm_weight_{which}"], g[f"norm_bias_{which}"], g["eps"])

    def feed(x: Tensor) -> Tensor:
        hidden = F.linear(x, g["ffn_weight_1"], g["ffn_bias_1"])
        hidden = F.gelu(hidden) if g["use_gelu"] else F.relu(hidden)
        return F.linear(hidden, g["ffn_weight_2"], g["ffn_bias_2"])

    with torch.no_grad():
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
    q, k, v = rearrange(
        F.linear(x, given["qkv_weight"], given["qkv_bias"]), "b t (three h d) -> three b h t d", three=3, h=heads
    )
    mask = _mask(given["mask"], given["mask_type"], b, t)
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


def _no_dispatch(original: Any, args: Iterable[Any]) -> bool:
    """In a traced thread our mode is no reason to leave the fast path; a tensor subclass or another mode is."""
    answer, tracing = bool(original(args)), current()
    if not answer or tracing is None:
        return answer
    with tracing.aside():
        return bool(original(args))


TAP = Tap(
    "mha",
    kernels={
        "multi_head_attention_forward": handle_python,
        "_native_multi_head_attention": handle_native,
        "_transformer_encoder_layer_fwd": handle_layer,
    },
    mode_patches=lambda: (Patch(torch.overrides, "has_torch_function", _no_dispatch),),
)
