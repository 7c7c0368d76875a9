"""One running trace: brackets, patches and the function mode around a model, and what becomes of each call seen."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import attention as math
from .certificate import UNVERIFIED, Pending, measure, rows_to_check
from .errors import ModelError, UnfaithfulError
from .hooks import Brackets, Plan
from .record import FIELDS, KernelCall
from .selection import Selection, grouped, restrict
from .site import Site
from .taps import TAPS, kernels
from .taps.current import current, set_current
from .taps.patch import install, remove
from .taps.watch import Watch
from .trace import Call, Skipped, Trace

Sink = Callable[[Call], None]


class Session:
    """A trace while it runs, in the thread that started it.

    Args:
        plan: what is traced, and how.
        trace: gets the calls.
        selection: what is kept of each.
        verify: ``"sample"``, ``"full"`` or ``"off"``.
        strict: raise at the first unfaithful call that is read back, rather than warn.
        sink: takes each finished call (a file); None: they stay in memory.
    """

    def __init__(
        self, plan: Plan, trace: Trace, selection: Selection, verify: str, strict: bool, sink: Sink | None = None
    ):
        self.plan, self.trace, self.selection = plan, trace, selection
        self.verify, self.strict, self.sink = verify, strict, sink
        self.watch = Watch(self, kernels())
        self.brackets = Brackets(self.plan, self._enter_site, self._leave_site, self.next_step, self._ran, self.forward)
        self.step = -1
        self.seen: set[str] = set()
        self.ran: dict[str, str] = {}
        self.recorded = 0
        self.matched: set[int] = set()
        self._last: dict[tuple[str, str], int] = {}
        self._sites: list[tuple[Site, bool]] = []
        self._order: dict[tuple[str, str], list[str]] = {}
        self._skipped: dict[tuple[str, str], set[int]] = {}
        self._pending: dict[int, Pending] = {}
        self._shared: dict[Any, tuple[Tensor, Any]] = {}
        self._step_shared: dict[Any, tuple[Tensor, Any]] = {}
        self._patched: list[tuple[int, str]] = []
        self._pushed = 0
        self._stance: Any = None

    # Life

    def start(self) -> None:
        """Attach everything.

        Raises:
            ModelError: a trace already runs in this thread.
        """
        if current() is not None:
            raise ModelError("a trace is already running in this thread; finish it before starting another.")
        self.before = set_current(self)
        try:
            self._patched = install(p for tap in TAPS if tap.patches is not None for p in tap.patches())
            self.brackets.install()
            self._uncompile()
            if self.plan.watch_all:
                self._push()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Detach everything, whatever state the forward left it in."""
        for mode in reversed([m for m in self._take_modes() if m is not self.watch]):
            torch._C._push_on_torch_function_stack(mode)
        self.brackets.remove()
        remove(self._patched)
        self._patched = []
        self._sites.clear()
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None
        if self.active():
            set_current(None)
        self.watch.flush()

    def _uncompile(self) -> None:
        if self.plan.compiled or any(_is_compiled(module) for module in self.plan.modules.values()):
            self._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()
            self.trace.notes.append(
                "the model is compiled; it ran uncompiled while it was traced, so its outputs may "
                "differ in the last bits from the compiled ones"
            )

    def active(self) -> bool:
        """Whether the current thread is the traced one."""
        return current() is self

    def forward(self) -> bool:
        """Whether this is the traced thread, and not in a backward pass, which runs checkpointed parts again."""
        return current() is self and not _in_backward()

    def alone(self) -> bool:
        """Whether ours is open, and no other function mode beside it."""
        return self._on_top() and torch._C._len_torch_function_stack() == 1

    # The function mode

    def _on_top(self) -> bool:
        n = torch._C._len_torch_function_stack()
        return n > 0 and torch._C._get_function_stack_at(n - 1) is self.watch

    def _push(self) -> None:
        torch._C._push_on_torch_function_stack(self.watch)

    def _pop(self) -> None:
        torch._C._pop_torch_function_stack()

    def _open(self) -> bool:
        return any(
            torch._C._get_function_stack_at(i) is self.watch for i in range(torch._C._len_torch_function_stack())
        )

    def _take_modes(self) -> list[TorchFunctionMode]:
        """Pop modes, the topmost first, until ours is not open any more."""
        taken: list[TorchFunctionMode] = []
        while self._open():
            taken.append(torch._C._pop_torch_function_stack())
        return taken

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Without our mode: for kernels that must not see it."""
        taken = self._take_modes()
        others = [m for m in reversed(taken) if m is not self.watch]
        for mode in others:
            torch._C._push_on_torch_function_stack(mode)
        try:
            yield
        finally:
            for _ in others:
                torch._C._pop_torch_function_stack()
            for mode in reversed(taken):
                torch._C._push_on_torch_function_stack(mode)

    @contextmanager
    def kernel(self, sealed: bool) -> Iterator[Callable[[], bool]]:
        """Around one kernel; yields a function that tells whether a tap saw it."""
        before = self.recorded
        if sealed:
            with self.aside():
                yield lambda: self.recorded > before
        elif self._on_top():
            yield lambda: self.recorded > before
        else:
            self._push()
            try:
                yield lambda: self.recorded > before
            finally:
                self._pop()

    # Where we are

    def next_step(self) -> None:
        """A forward of the whole model begins."""
        self.step += 1
        self._sites.clear()
        self._step_shared.clear()

    def _enter_site(self, site: Site, sealed: bool) -> None:
        opened = not sealed and not self._on_top()
        if opened:
            self._push()
        self._sites.append((site, opened))
        self.ran.setdefault(site.path, site.module)

    def _leave_site(self) -> None:
        if self._sites:
            _, opened = self._sites.pop()
            if opened and self._on_top():
                self._pop()

    def _ran(self, path: str, module: nn.Module) -> None:
        self.ran.setdefault(path, type(module).__name__)

    def where(self) -> str:
        """The path of the site that is running, or else of the innermost module."""
        return self._sites[-1][0].path if self._sites and not self.plan.watch_all else self.brackets.running()

    def _site(self, within: str) -> Site:
        if self._sites and not self.plan.watch_all:
            return self._sites[-1][0]
        path = ".".join(x for x in (self.brackets.running(), within) if x)
        for site, _ in reversed(self._sites):
            if path == site.path or path.startswith(site.path + "."):
                return site
        return self.brackets.site(path)

    # What the taps report

    def wants(self, field: str) -> bool:
        """Whether a field was asked for."""
        return field in self.selection.capture

    def skip(self, reason: str, path: str | None = None) -> None:
        """Attention ran that cannot be read."""
        if _in_backward():
            return
        path = self.where() if path is None else path
        self.seen.add(path)
        self._skipped.setdefault((path, reason), set()).add(max(self.step, 0))

    def split(self, additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Bias and mask of an additive mask, once for a tensor that many layers share."""
        return self._once("split", additive, lambda: math.split_additive(additive))  # type: ignore[no-any-return]

    def record(self, call: KernelCall) -> None:
        """Take one call: select, derive, measure, keep."""
        if _in_backward():
            return
        self.recorded += 1
        with torch.no_grad(), _without_autocast(call.q.device.type):
            self._record(call)

    def _record(self, call: KernelCall) -> None:
        site = self._site(call.within)
        if call.crosses and site.kind == "self" and id(self.plan.model.get_submodule(site.path)) not in self.plan.sites:
            site = replace(site, kind="cross")
        site = self._ordered(site)
        self.seen.add(site.path)
        place = (site.stack, site.kind)
        self._last[place] = max(self._last.get(place, 0), site.layer or 0)
        takes = self.selection.takes_layer(site)
        if takes is False:
            return
        _detach(call)
        if call.mask is not None and call.mask.dtype != torch.bool:
            call.mask = call.mask.bool()
        b, h, t, _ = call.q.shape
        call.mask = self._full_mask(call)
        heads = self.selection.head_index(h, site.label)
        queries = self.selection.query_index(t, site.label)
        groups = restrict(call, heads, queries)
        whole = grouped(call, groups)
        pending, scores, weights = self._derive(whole)
        made = Call(
            site=site,
            step=max(self.step, 0),
            index=len(self.trace.calls),
            tap=call.tap,
            dtype=call.dtype,
            scale=self._scale(call),
            softcap=call.softcap,
            causal=call.causal,
            window=call.window,
            dropout=call.dropout,
            heads=None if heads is None else tuple(heads),
            kv_heads=None if groups is None else tuple(groups),
            queries=None if queries is None else tuple(range(t)[queries] if isinstance(queries, slice) else queries),
            notes=tuple(call.notes),
        )
        values: dict[str, Tensor | None] = {
            "q": call.q,
            "k": call.k,
            "v": call.v,
            "bias": call.bias,
            "scores": scores,
            "mask": call.mask,
            "sinks": call.sinks,
            "weights": weights,
            "output": call.output,
        }
        fresh = {"scores"} if scores is not call.scores else set()
        if weights is not call.weights:
            fresh.add("weights")
        for name in FIELDS:
            if name in self.selection.capture:
                made.fields[name] = self._keep(name, values[name], name in fresh)
        if not call.opaque:
            made.derivable = _derivable(made)
        if pending is not None:
            self._pending[id(made)] = pending
        self.trace.calls.append(made)
        if self.sink is not None and takes:
            self.sink(made)

    def _scale(self, call: KernelCall) -> float | Tensor:
        scale = call.scale
        return scale.to(self.selection.device or scale.device, copy=True) if isinstance(scale, Tensor) else scale

    def _ordered(self, site: Site) -> Site:
        """A site without a number gets its place among those of its stack and kind."""
        if site.layer is not None:
            return site
        order = self._order.setdefault((site.stack, site.kind), [])
        if site.path not in order:
            order.append(site.path)
        return replace(site, layer=order.index(site.path))

    def _full_mask(self, call: KernelCall) -> Tensor:
        t, s = call.q.shape[2], call.k.shape[2]
        device = call.q.device
        mask = call.mask
        if call.causal or call.window is not None:
            key = (t, s, call.offset, call.window, call.causal, device)
            own = self._once(
                key,
                None,
                lambda: math.causal_mask(
                    t, s, window=call.window, offset=call.offset, causal=call.causal, device=device
                ),
            )
            mask = own if mask is None else own & mask
        if mask is None:
            mask = self._once(("all", device), None, lambda: torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device))
        return mask

    def _derive(self, call: KernelCall) -> tuple[Pending | None, Tensor | None, Tensor | None]:
        """Scores and weights as far as they are wanted, and the certificate's measurements."""
        assert call.mask is not None
        mask = None if call.mask.numel() == 1 and not call.causal and call.window is None else call.mask
        empty = mask is not None and self._has_empty(mask)
        scores, weights = call.scores, call.weights
        if (scores is None and self.wants("scores")) or (weights is None and self.wants("weights")):
            scores = self._scores(call, slice(None)) if scores is None else scores
            if weights is None and self.wants("weights"):
                weights = math.softmax_weights(scores, mask, call.sinks, empty)
        if self.verify == "off":
            return None, scores, self._narrow(weights, call)
        rows = rows_to_check(call.q.shape[2], self.verify == "full")
        if call.weights is None and weights is not None:
            derived = weights[:, :, rows]
        else:
            part = self._scores(call, rows) if scores is None or not call.opaque else scores[:, :, rows]
            row_mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
            sinks = call.sinks
            if sinks is not None and sinks.dim() == 4 and sinks.shape[2] > 1:
                sinks = sinks[:, :, rows]
            derived = math.softmax_weights(part.to(math.compute_dtype(part.dtype)), row_mask, sinks, empty)
        return measure(call, rows, mask if empty else None, derived), scores, self._narrow(weights, call)

    def _narrow(self, weights: Tensor | None, call: KernelCall) -> Tensor | None:
        """Derived weights in the kernel's dtype, as the kernel would have formed them."""
        return weights if weights is None or call.weights is not None else weights.to(call.dtype)

    def _scores(self, call: KernelCall, rows: slice) -> Tensor:
        def cut(x: Any) -> Any:
            return x[:, :, rows] if isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] > 1 else x

        return math.finish_scores(
            math.dot_scores(call.q[:, :, rows], call.k, cut(call.scale)), call.softcap, cut(call.bias)
        )

    def _has_empty(self, mask: Tensor) -> bool:
        return bool(self._once("empty", mask, lambda: not bool(mask.any(-1).all())))

    def _once(self, key: Any, tensor: Tensor | None, make: Callable[[], Any]) -> Any:
        """Computed once for a tensor that many layers share; forgotten with the step."""
        if tensor is not None:
            version = -1 if tensor.is_inference() else tensor._version
            key = (key, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, version)
        known = self._step_shared.get(key)
        if known is not None and known[2] is not None and not torch.equal(known[2], known[0]):
            known = None  # written to since
        if known is None:
            before = tensor.clone() if tensor is not None and tensor.is_inference() else None  # it counts no writes
            known = self._step_shared[key] = (tensor, make(), before)  # type: ignore[assignment]
        return known[1]

    def _keep(self, name: str, x: Tensor | None, fresh: bool) -> Tensor | None:
        if x is None:
            return None
        if name in ("mask", "bias", "sinks"):
            return self._once(("kept", name), x, lambda: self._store(x, False))  # type: ignore[no-any-return]
        return self._store(x, fresh)

    def _store(self, x: Tensor, fresh: bool) -> Tensor:
        dtype = self.selection.dtype if x.is_floating_point() and self.selection.dtype is not None else x.dtype
        device = self.selection.device or x.device
        if dtype != x.dtype or device != x.device:
            return x.to(device=device, dtype=dtype, memory_format=torch.contiguous_format, copy=True)
        return x if fresh and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)

    # The end

    def finish(self) -> None:
        """Read the certificates, drop what a selection could not drop earlier, list what was skipped."""
        self._settle()
        self._late_layers()
        for path, module in self.ran.items():
            if not any(_within(seen, path) or _within(path, seen) for seen in self.seen):
                self._skipped.setdefault((path, f"{module} ran, and no softmax over q·k was seen in it"), set()).add(
                    max(self.step, 0)
                )
        self.trace.skipped = [
            Skipped(path, reason, tuple(sorted(steps))) for (path, reason), steps in self._skipped.items()
        ]

    def _settle(self) -> None:
        by_device: dict[torch.device, list[tuple[Call, Pending]]] = {}
        for call in self.trace.calls:
            pending = self._pending.pop(id(call), None)
            if pending is not None:
                by_device.setdefault(pending.errors.device, []).append((call, pending))
        for pairs in by_device.values():
            values = torch.stack([p.errors.double() for _, p in pairs]).tolist()
            for (call, pending), row in zip(pairs, values, strict=True):
                call.certificate = pending.settle(row)
        bad = [c for c in self.trace.calls if c.certificate.status == "unfaithful"]
        if bad and self.strict:
            raise UnfaithfulError(
                f"{len(bad)} of {len(self.trace.calls)} calls are not what the model's kernel returned; the first is "
                f"{bad[0].site.label} (tap {bad[0].tap}): {bad[0].certificate}. Trace with strict=False to look at it."
            )

    def _late_layers(self) -> None:
        """Layers counted from the end, where the number of layers is known only now."""
        if self.selection.layers is None:
            return

        def takes(site: Site) -> bool:
            n = site.layers or self._last[(site.stack, site.kind)] + 1
            fits = {i for i in self.selection.layers or () if site.layer == (i if i >= 0 else n + i)}
            self.matched |= fits
            return bool(fits)

        self.trace.calls[:] = [c for c in self.trace.calls if takes(c.site)]
        for i, call in enumerate(self.trace.calls):
            call.index = i

    def describe_layers(self) -> str:
        """The last layer of every stack that ran, as text."""
        return ", ".join(f"{n} ({stack} {kind})" for (stack, kind), n in self._last.items())


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(outer + ".") or not outer


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _is_compiled(module: nn.Module) -> bool:
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module, "_orig_mod")
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )


def _derivable(call: Call) -> tuple[str, ...]:
    kept = call.fields
    if {"q", "k", "mask", "bias", "sinks"} <= kept.keys():
        return ("scores", "weights")
    return ()


def _detach(call: KernelCall) -> None:
    for name in (
        "q",
        "k",
        "v",
        "output",
        "bias",
        "mask",
        "sinks",
        "scores",
        "weights",
        "applied",
        "undropped",
        "scale",
    ):
        x = getattr(call, name)
        if isinstance(x, Tensor) and x.requires_grad:
            setattr(call, name, x.detach())


@contextmanager
def _without_autocast(device: str) -> Iterator[None]:
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            yield
    else:
        yield


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Class, configuration and versions, for the trace's header."""
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    elif config is not None and not isinstance(config, dict):
        config = {k: v for k, v in vars(config).items()} if hasattr(config, "__dict__") else repr(config)
    cls = type(model)
    return {
        "class": cls.__name__,
        "module": cls.__module__,
        "config": config,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


__all__ = ["UNVERIFIED", "Session", "describe_model", "threading"]
