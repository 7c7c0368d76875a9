"""From a kernel's arguments to what is kept of the call: selected, derived, measured, copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import attention as math
from .certificate import Later, Pending, measure, rows_to_check
from .record import FIELDS, KernelCall
from .selection import Selection, grouped, restrict
from .site import Site
from .trace import Call

# Up to this many elements of k a call is measured together with others: what costs is the number of operations.
_SMALL = 1 << 18
_TENSORS = tuple("q k v output bias mask sinks scores weights applied undropped scale".split())


class Keeper:
    """Makes Calls of kernel calls.

    Args:
        selection: what is kept of each.
        verify: ``"sample"``, ``"full"`` or ``"off"``.
    """

    def __init__(self, selection: Selection, verify: str):
        self.selection, self.verify = selection, verify
        self._shared: dict[Any, tuple[Tensor | None, Any, Tensor | None]] = {}

    def forget(self) -> None:
        """A new forward: nothing is shared with the one before."""
        self._shared.clear()

    def split(self, additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Bias and mask of an additive mask, once for a tensor that many layers share."""
        return self._once("split", additive, lambda: math.split_additive(additive))  # type: ignore[no-any-return]

    def wants(self, field: str) -> bool:
        """Whether a field was asked for."""
        return field in self.selection.capture

    def keep(self, call: KernelCall, site: Site, step: int, index: int, put_off: bool) -> tuple[Call, Pending | None]:
        """What is kept of one call, and its certificate's measurements.

        With ``put_off`` a small call may be measured later, together with others, from the tensors that are kept.

        Raises:
            SelectionError: a selected head or query is not there.
        """
        # A function mode of the user's own shall not see what is computed here.
        with torch.no_grad(), torch._C.DisableTorchFunction(), _without_autocast(call.q.device.type):
            return self._make(call, site, step, index, put_off)

    def _make(self, call: KernelCall, site: Site, step: int, index: int, put_off: bool) -> tuple[Call, Pending | None]:
        for name in _TENSORS:
            x = getattr(call, name)
            if isinstance(x, Tensor) and x.requires_grad:
                setattr(call, name, x.detach())
        call.mask = self._full_mask(call)
        h, t = call.q.shape[1:3]
        heads = self.selection.head_index(h, site.label)
        queries = self.selection.query_index(t, site.label)
        groups = restrict(call, heads, queries)
        later = put_off and groups is None and self._can_wait(call)
        pending, scores, weights = self._derive(grouped(call, groups), later)
        scale = call.scale
        if isinstance(scale, Tensor):
            scale = scale.to(self.selection.device or scale.device, copy=True)
        made = Call(
            site=site,
            step=step,
            index=index,
            tap=call.tap,
            dtype=call.dtype,
            scale=scale,
            softcap=call.softcap,
            causal=call.causal,
            window=call.window,
            dropout=call.dropout,
            heads=None if heads is None else tuple(heads),
            kv_heads=None if groups is None else tuple(groups),
            queries=None if queries is None else tuple(range(t)[queries] if isinstance(queries, slice) else queries),
            own_scores=call.opaque,
            mixed=call.mixed,
            notes=tuple(call.notes),
        )
        fresh = {"scores": scores is not call.scores, "weights": weights is not call.weights}
        for name in FIELDS:
            if name in self.selection.capture:
                value = scores if name == "scores" else weights if name == "weights" else getattr(call, name)
                made.fields[name] = self._keep(name, value, fresh.get(name, False))
        if not call.opaque and {"q", "k", "mask", "bias", "sinks"} <= made.fields.keys():
            made.derivable = ("scores", "weights")
        if later:
            pending = self._put_off(call, made, weights)
        return made, pending

    def _can_wait(self, call: KernelCall) -> bool:
        """Whether a call is small and plain enough to be measured later, with others of its shape."""
        plain = not (call.bias is not None or call.sinks is not None or call.softcap is not None)
        own = call.weights is not None or call.outer_error is not None or call.undropped is not None
        same = self.selection.dtype is None and self.selection.device is None
        return (
            plain
            and not own
            and same
            and call.output is not None
            and isinstance(call.scale, float)
            and {"k", "v"} <= self.selection.capture
            and self.verify == "sample"
            and 0 < call.k.numel() <= _SMALL
            and call.q.numel() > 0
        )

    def _put_off(self, call: KernelCall, made: Call, weights: Tensor | None) -> Pending:
        """What is needed to measure a call later: tensors that are kept anyway, and copies of a few rows."""
        assert call.mask is not None and call.output is not None and isinstance(call.scale, float)
        rows = rows_to_check(call.q.shape[2], False)
        mask = self._real_mask(call)
        kept = None if mask is None else self._keep("mask", mask, False)  # the model may write to its own until then
        weight_rows = None if weights is None else weights[:, :, rows]
        return Pending.later(
            Later(
                q=call.q[:, :, rows].clone(),
                k=made.k,
                v=made.v,
                output=call.output[:, :, rows].clone(),
                weights=weight_rows,
                mask=kept if kept is None or kept.shape[2] == 1 else kept[:, :, rows],
                mask_key=kept.data_ptr() if kept is not None else 0,
                empty=mask is not None and self._has_empty(mask),
                scale=call.scale,
            ),
            call,
            rows,
        )

    def _real_mask(self, call: KernelCall) -> Tensor | None:
        """The complete mask; None where it hides nothing."""
        assert call.mask is not None
        return None if call.mask.numel() == 1 and not call.causal and call.window is None else call.mask

    def _full_mask(self, call: KernelCall) -> Tensor:
        t, s = call.q.shape[2], call.k.shape[2]
        device = call.q.device
        mask = call.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.bool()
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

    def _derive(self, call: KernelCall, later: bool) -> tuple[Pending | None, Tensor | None, Tensor | None]:
        """Scores and weights as far as they are wanted, and the certificate's measurements unless they come later."""
        mask = self._real_mask(call)
        empty = mask is not None and self._has_empty(mask)
        scores, weights = call.scores, call.weights
        if (scores is None and self.wants("scores")) or (weights is None and self.wants("weights")):
            if scores is None:
                missing = weights is None and self.wants("weights")
                scores, derived = self._blocks(call, mask, empty, missing)
                weights = derived if missing else weights
            else:
                weights = math.softmax_weights(scores, mask, call.sinks, empty)
        if self.verify == "off" or later:
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

    def _blocks(
        self, call: KernelCall, mask: Tensor | None, empty: bool, weights: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        return math.derive(
            call.q,
            call.k,
            call.scale,
            softcap=call.softcap,
            bias=call.bias,
            mask=mask,
            sinks=call.sinks,
            empty=empty,
            want_scores=self.wants("scores"),
            want_weights=weights,
        )

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
        known = self._shared.get(key)
        if known is not None and tensor is not None and known[2] is not None and not torch.equal(known[2], tensor):
            known = None  # written to since
        if known is None:
            before = tensor.clone() if tensor is not None and tensor.is_inference() else None  # it counts no writes
            known = self._shared[key] = (tensor, make(), before)
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


@contextmanager
def _without_autocast(device: str) -> Iterator[None]:
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            yield
    else:
        yield
