"""The transformers attention interface: where every implementation is looked up, and where the axes are named.

The function that the model looks up is wrapped: its q, k and v say which axis is which, whichever kernel is inside.
What the kernel inside really gets is left to that kernel's own tap. A kernel that no tap sees (compiled flex_attention,
a flash kernel, a function that somebody registered) is read from the interface's documented arguments; its certificate
tells whether that reading is right.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..record import KernelCall
from . import sdpa
from .axes import seeded
from .base import Patch, Tap
from .current import current
from .flex import block_mask_dense

if TYPE_CHECKING:
    from .watch import Watch

_KERNEL = torch.nn.functional.scaled_dot_product_attention
_MODULE = "transformers.modeling_utils"
# Implementations that run compiled or foreign code: the mode must not be open inside.
_SEALED = ("flex", "flash", "paged", "kernels")


def patches() -> Iterable[Patch]:
    """The look-up, if transformers is loaded at all."""
    module = sys.modules.get(_MODULE)
    if module is not None and hasattr(module, "AttentionInterface"):
        yield Patch(module.AttentionInterface, "get_interface", look_up)


def look_up(original: Callable[..., Any], interface: Any, attn_implementation: Any, default: Any) -> Any:
    """The implementation the model asked for, wrapped in a traced thread."""
    found = original(interface, attn_implementation, default)
    if current() is None:
        return found
    return functools.partial(run, found, str(attn_implementation))


def run(
    function: Callable[..., Any],
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run an implementation with the axes of its arguments known, and make sure that somebody saw its kernel."""
    tracing = current()
    if tracing is None:
        return function(module, query, key, value, attention_mask, *args, **kwargs)
    packs = query.shape[2] == 1 and query.shape[1] != key.shape[1]  # grouped heads become the rows of one query
    if name == "sdpa" and not packs and not tracing.modes.open():
        with Glance(tracing.watch, query, key, value):
            return function(module, query, key, value, attention_mask, *args, **kwargs)
    sealed = any(word in name for word in _SEALED)
    with tracing.kernel(sealed) as seen:
        if not sealed:
            for x, roles in ((query, "BHTD"), (key, "BHSD"), (value, "BHSD")):
                if x.dim() == 4:
                    # Outside a watched model nothing is known of where q and k come from: say the same.
                    roots = tracing.watch.origin(x).roots if tracing.plan.watch_all else frozenset((module,))
                    tracing.watch.set_origin(x, seeded(x.shape, tuple(roles), roots))
        out = function(module, query, key, value, attention_mask, *args, **kwargs)
    if not seen():
        with torch.no_grad(), tracing.aside():
            tracing.record(
                read(name, module, query, key, value, attention_mask, kwargs, out[0] if isinstance(out, tuple) else out)
            )
    return out


class Glance(TorchFunctionMode):
    """Sees the fused kernel inside the implementation and follows nothing else: q, k and v are known from outside."""

    def __init__(self, watch: Watch, query: Tensor, key: Tensor, value: Tensor):
        super().__init__()
        self.watch, self.query, self.key, self.value = watch, query, key, value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _KERNEL:
            return func(*args, **(kwargs or {}))
        return sdpa.handle(self.watch, func, args, kwargs or {}, self._ungrouped)

    def _ungrouped(self, given: dict[str, Any]) -> dict[str, Any]:
        """Keys and values as they were before they were repeated for grouped queries."""
        keys = given["key"].shape[2]
        if given["query"] is not self.query or given["key"].shape[1] == self.key.shape[1]:
            return given
        return {**given, "key": self.key[:, :, :keys], "value": self.value[:, :, :keys]}


def read(
    name: str, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, given: dict[str, Any], out: Tensor
) -> KernelCall:
    """One call from the interface's own arguments. ``out``: B T H E, as every implementation returns it."""
    scale = given.get("scaling")
    call = KernelCall(
        q=q,
        k=k,
        v=v,
        output=out.transpose(1, 2),
        tap=f"interface:{name}",
        scale=float(scale) if scale is not None else q.shape[-1] ** -0.5,
        softcap=given.get("softcap"),
        sinks=given.get("s_aux"),
        dropout=float(given.get("dropout") or 0),
    )
    tracing = current()
    t, s = q.shape[2], k.shape[2]
    causal = given.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal) and t > 1
    if isinstance(mask, Tensor) and mask.dim() == 2:  # flash kernels get the padding mask alone
        call.mask = mask.bool()[:, None, None, -s:]
    elif isinstance(mask, Tensor):
        mask = mask[..., :s]
        if mask.dtype == torch.bool:
            call.mask = mask
        else:
            call.bias, call.mask = tracing.split(mask)
    elif mask is not None:
        call.mask = block_mask_dense(mask, q, k)
    if given.get("position_bias") is not None:
        bias, hidden = tracing.split(given["position_bias"])
        if bias is not None:
            call.bias = bias if call.bias is None else call.bias + bias
        if hidden is not None:
            call.mask = hidden if call.mask is None else call.mask & hidden
    if "flash" in name:
        call.causal, call.offset, call.window = causal, s - t, given.get("sliding_window")
    return call


def covers(module: nn.Module) -> bool:
    """Whether a module's attention goes through the interface and a fused kernel, and nothing else."""
    forward = getattr(type(module), "forward", None)
    while (inner := getattr(forward, "__wrapped__", None)) is not None:
        forward = inner
    code = getattr(forward, "__code__", None)
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", "eager")
    return code is not None and "get_interface" in code.co_names and implementation not in ("eager", None)


TAP = Tap("interface", patches=patches, covers=covers)
