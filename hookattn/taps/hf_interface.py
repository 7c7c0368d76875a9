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
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.kernel_call import KernelCall
from ..torch_internals.code_patching import Patch
from ..torch_internals.frames import names_used
from ..torch_internals.function_modes import depth
from ..torch_internals.isolation import isolated, no_gradients
from . import sdpa
from .active import current
from .base import ActiveTrace, Tap
from .flex import block_mask_dense

_MODULE = "transformers.modeling_utils"
# Implementations that run compiled or foreign code: the mode must not be open inside.
_SEALED = ("flex", "flash", "paged", "kernels")


def patches() -> Iterable[Patch]:
    """The look-up, if transformers is loaded at all, and the fused kernel that its functions call."""
    interface = getattr(sys.modules.get(_MODULE), "AttentionInterface", None)
    if interface is None:
        return
    if "get_interface" in vars(interface):
        yield Patch(interface, "get_interface", wrapped_implementation)
    else:  # before 5.1 a model that is not eager takes an item; other mappings share the method
        yield Patch(
            next(kind for kind in interface.__mro__ if "__getitem__" in vars(kind)), "__getitem__", wrapped_item
        )
    yield Patch(torch.nn.functional, "scaled_dot_product_attention", kernel)


def wrapped_implementation(
    original: Callable[..., Any], interface: Any, attn_implementation: Any, *default: Any
) -> Any:
    """The implementation the model asked for, wrapped in a traced thread."""
    found = original(interface, attn_implementation, *default)
    if current() is None:
        return found
    return functools.partial(run, found, str(attn_implementation))


def wrapped_item(original: Callable[..., Any], mapping: Any, key: Any) -> Any:
    """The same, if the mapping is one of implementations."""
    interface = isinstance(mapping, sys.modules[_MODULE].AttentionInterface)
    return wrapped_implementation(original, mapping, key) if interface else original(mapping, key)


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
    if name == "sdpa" and not (depth() and tracing.watching()):
        # Without the mode: the fused kernel is looked at as it is called, and q, k and v are known from here.
        heard, around = tracing.heard, tracing.glanced  # an implementation may look up another
        # By hand and no context manager: this runs in every layer, and entering one took as long as a small kernel.
        tracing.glanced = module, query, key, value
        try:
            out = function(module, query, key, value, attention_mask, *args, **kwargs)
        finally:
            tracing.glanced = around
        if tracing.heard == heard:
            with isolated(query, but=tracing.attached):
                tracing.record(read(tracing, "sdpa", module, query, key, value, attention_mask, kwargs, out[0]))
        return out
    sealed = any(word in name for word in _SEALED)
    with tracing.kernel(sealed) as seen:
        if not sealed:
            for x, roles in ((query, "BHTD"), (key, "BHSD"), (value, "BHSD")):
                if x.dim() == 4:
                    tracing.seed(x, roles)
        out = function(module, query, key, value, attention_mask, *args, **kwargs)
    if not seen():
        with no_gradients(but=tracing.attached), tracing.aside():
            first = out[0] if isinstance(out, tuple) else out
            tracing.record(read(tracing, name, module, query, key, value, attention_mask, kwargs, first))
    return out


def kernel(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The fused kernel; inside an implementation that is glanced at, its real arguments are reported."""
    tracing = current()
    if tracing is None or (running := tracing.glanced) is None:
        return original(*args, **kwargs)
    module, query, key, value = running
    if tracing.listened:
        return _changeable(tracing, original, sdpa.bind(args, kwargs), running)
    out = original(*args, **kwargs)
    scale = kwargs.get("scale")
    if len(args) == 3 and args[0] is query and args[1] is key and args[2] is value and type(scale) is float:
        same = query.dtype is key.dtype is value.dtype is out.dtype and query.size(0) == key.size(0) == out.size(0)
        if same and kwargs.get("attn_mask") is None and not kwargs.get("dropout_p"):
            # As it stands: reading the arguments by name takes longer than recording them.
            call = KernelCall(query, key, value, out, scale, "sdpa")
            call.causal, call.module = bool(kwargs.get("is_causal")), module
            if tracing.gradients:
                call.result = out
            tracing.record(call)
            return out
    given = sdpa.bind(args, kwargs)
    if given["query"] is query:  # else grouped heads were packed into the rows of one query: read from outside
        tracing.record(_glanced(tracing, original, given, out, module, key, value))
    return out


def _glanced(
    tracing: ActiveTrace,
    original: Callable[..., Any],
    given: dict[str, Any],
    out: Tensor,
    module: nn.Module,
    key: Tensor,
    value: Tensor,
) -> KernelCall:
    """The fused kernel's call, with k and v as the implementation was given them: B G S D."""
    call = sdpa.plain(tracing, original, given, out, module)
    # The implementation repeated k and v for grouped queries before the kernel; the contract has them once a group.
    if call.k.shape[1] != key.shape[1]:
        keys = call.k.shape[2]
        key, value = (x[:, :, :keys].to(call.k.dtype) for x in (key, value))
        call.q, call.k, call.v = sdpa.full(call.q, key, value, out)
    return call


def _changeable(
    tracing: ActiveTrace,
    original: Callable[..., Any],
    given: dict[str, Any],
    running: tuple[nn.Module, Tensor, Tensor, Tensor],
) -> Any:
    """The fused kernel where somebody listens: run with what it shall be given."""
    module, query, key, value = running
    if given["query"] is not query:  # packed: read from outside, which also says that nobody was asked
        return original(**given)
    grouped = None
    if given["key"].shape[1] != key.shape[1]:
        keys = given["key"].shape[2]
        grouped = key[:, :, :keys], value[:, :, :keys]
    changed, key, value = sdpa.ask(tracing, given, module, grouped)
    out = original(**changed)
    call = _glanced(tracing, original, changed, out, module, key, value)
    result = sdpa.answer(tracing, call, out)
    tracing.record(call)
    return result


def read(
    tracing: ActiveTrace,
    name: str,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    given: dict[str, Any],
    out: Tensor,
) -> KernelCall:
    """One call from the interface's own arguments. ``out``: B T H E, as every implementation returns it."""
    scale = given.get("scaling")
    call = KernelCall(
        q=q,
        k=k,
        v=v,
        output=_heads_second(out),
        module=module,
        tap=f"interface:{name}",
        scale=float(scale) if scale is not None else q.shape[-1] ** -0.5,
        softcap=given.get("softcap"),
        sinks=given.get("s_aux"),
        dropout=float(given.get("dropout") or 0),
        result=out,
        result_form=_heads_second,
    )
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
    if name == "sdpa":
        call.causal = causal and mask is None
    elif "flash" in name:
        call.causal, call.offset, call.window = causal, s - t, given.get("sliding_window")
    return call


def _heads_second(x: Tensor) -> Tensor:
    """B T H E -> B H T E."""
    return x.transpose(1, 2)


def covers(modules: Iterable[nn.Module]) -> set[int]:
    """The modules whose attention goes through the interface and a fused kernel, and nothing else."""
    found = set()
    known: dict[tuple[type, int], bool] = {}  # most share one class and one configuration
    for module in modules:
        config = getattr(module, "config", None)
        key = type(module), id(config)
        if key not in known:
            fused = getattr(config, "_attn_implementation", None) not in ("eager", None)
            known[key] = fused and _asks(getattr(type(module), "forward", None))
        if known[key]:
            found.add(id(module))
    return found


@functools.lru_cache(maxsize=1024)
def _asks(forward: Any) -> bool:
    """Whether a forward asks the interface for its function."""
    while (inner := getattr(forward, "__wrapped__", None)) is not None:
        forward = inner
    return "get_interface" in names_used(forward)


TAP = Tap("interface", patches=patches, covers=covers)
