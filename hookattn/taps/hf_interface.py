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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.kernel_call import KernelCall
from ..torch_internals.code_patching import Patch
from ..torch_internals.devices import random_state
from ..torch_internals.frames import names_used
from ..torch_internals.function_modes import depth
from ..torch_internals.isolation import isolated, no_gradients
from . import sdpa
from .active import current, paused
from .base import ActiveTrace, Change, Tap
from .flex import block_mask_dense
from .packed_kernels import check_shape, first_exchanged

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
    random = random_state(query.device) if tracing.listened and kwargs.get("dropout") else None
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
            if tracing.listened:
                given = _Given("sdpa", module, query, key, value, attention_mask, args, kwargs, random)
                return _asked_from_outside(tracing, function, given, out)
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
        if tracing.listened:
            given = _Given(name, module, query, key, value, attention_mask, args, kwargs, random)
            return _asked_from_outside(tracing, function, given, out)
        with no_gradients(but=tracing.attached), tracing.aside():
            first = out[0] if isinstance(out, tuple) else out
            tracing.record(read(tracing, name, module, query, key, value, attention_mask, kwargs, first))
    return out


class _Given(NamedTuple):
    """What an implementation was given: its name, the module, q B H T D, k and v B G S D, the mask and the rest; and
    the state of the random numbers before it ran, where it may draw some."""

    name: str
    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    to_first_run: Callable[[], None] | None

    def run(self, function: Callable[..., Any]) -> Any:
        """What the implementation makes of it; nothing is traced inside."""
        if self.to_first_run is not None:
            self.to_first_run()
        with paused():
            return function(self.module, self.q, self.k, self.v, self.mask, *self.args, **self.kwargs)

    def changeable(self) -> frozenset[str]:
        """What an implementation can be given changed, whatever it is.

        A mask of four axes is added to the scores, or says what may be attended to. What is done with another one, or
        with one where there was none, nobody has said, nor how it goes together with what flash kernels hide.
        """
        mask = self.mask
        if not isinstance(mask, Tensor) or mask.dim() != 4 or any(word in self.name for word in _SEALED):
            return frozenset("qkv")
        # With a position bias, the bias of the call is the sum of two arguments.
        added = mask.is_floating_point() and self.kwargs.get("position_bias") is None
        return frozenset({"q", "k", "v", "mask", *(["bias"] if added else [])})

    def read(self, tracing: ActiveTrace, out: Tensor | None) -> KernelCall:
        """The call; ``out``: B T H E."""
        return read(tracing, self.name, self.module, self.q, self.k, self.v, self.mask, self.kwargs, out)


def _asked_from_outside(tracing: ActiveTrace, function: Callable[..., Any], given: _Given, out: Any) -> Any:
    """An implementation whose kernel no tap has seen, where somebody listens.

    That no tap sees it is known only when it has run. So it runs again where it shall be given something else, from the
    random numbers that it drew first, and what it returned at first is forgotten.

    Args:
        tracing: the running trace.
        function: the implementation.
        given: its arguments.
        out: what it returned for them: B T H E, and maybe more beside it.
    """
    with tracing.aside():
        call = given.read(tracing, None)
        change = tracing.before(call, given.changeable())
        if change is not None:
            given, out = _run_changed(tracing, function, given, call, change, out)
        first = out[0] if isinstance(out, tuple) else out
        made = given.read(tracing, first)
        made.edits = call.edits
        assert made.output is not None
        instead = tracing.after(made)
        with no_gradients(but=tracing.attached):
            tracing.record(made)
        if instead is None:
            return out
        check_shape(instead, made.output, "output", tracing.where())
        return first_exchanged(out, instead.to(first.dtype).transpose(1, 2).contiguous())


def _run_changed(
    tracing: ActiveTrace, function: Callable[..., Any], given: _Given, call: KernelCall, change: Change, out: Any
) -> tuple[_Given, Any]:
    """The arguments with what is changed in them, and what the implementation makes of those."""
    for name in ("q", "k", "v"):
        x = getattr(change, name)
        if x is not None:
            check_shape(x, getattr(given, name), name, tracing.where())
            given = given._replace(**{name: x.to(getattr(given, name).dtype)})
            out = None
    if out is None:
        out = given.run(function)
    if change.bias is None and change.mask is None:
        return given, out
    given = given._replace(mask=_combined(call, change, given))
    masked = given.run(function)
    if change.heads is None and change.queries is None:
        return given, masked
    first, other = (x[0] if isinstance(x, tuple) else x for x in (out, masked))
    _, t, h, _ = first.shape
    rows = torch.tensor(change.queries or range(t), device=first.device)[:, None]
    heads = torch.tensor(change.heads or range(h), device=first.device)
    made = first.clone()
    made[:, rows, heads] = other[:, rows, heads]
    return given, first_exchanged(out, made)


def _combined(call: KernelCall, change: Change, given: _Given) -> Tensor:
    """The mask of four axes with a changed bias or mask in it, of the kind that it was."""
    own: Tensor = given.mask[..., : given.k.shape[2]]
    keep = call.mask if change.mask is None else change.mask
    if own.dtype == torch.bool:
        assert keep is not None
        return keep
    bias = change.bias
    if bias is None:
        bias = own if call.mask is None else torch.where(call.mask, own, 0.0)
    bias = bias.to(own.dtype)
    return bias if keep is None else torch.where(keep, bias, torch.finfo(own.dtype).min)


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
    asked = sdpa.ask(tracing, given, module=module, grouped=grouped)
    out = asked.run(original)
    call = _glanced(tracing, original, asked.given, out, module, asked.k, asked.v)
    result = sdpa.answer(tracing, asked, call, out)
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
    out: Tensor | None,
) -> KernelCall:
    """One call from the interface's own arguments. ``out``: B T H E, as every implementation returns it; None: it has
    not run."""
    scale = given.get("scaling")
    call = KernelCall(
        q=q,
        k=k,
        v=v,
        output=None if out is None else _heads_second(out),
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
            call.bias, call.mask = sdpa.split_mask(tracing, mask)
    elif mask is not None:
        call.mask = block_mask_dense(mask, q, k)
    if given.get("position_bias") is not None:
        bias, hidden = sdpa.split_mask(tracing, given["position_bias"])
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
