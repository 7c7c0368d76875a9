"""From a kernel's arguments to what is kept of the call: selected, derived, measured, copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..attention import functional as math
from ..attention.derivation import derive
from ..attention.kernel_call import FIELDS, KernelCall
from ..attention.masks import CompleteMask, CompleteMasks, Diagonal, split_additive
from ..calls.call import Call
from ..calls.fields import Field, Later
from ..calls.site import Site
from ..torch_internals import allocation, devices
from ..torch_internals.isolation import isolated
from ..torch_internals.tensor_memo import TensorMemo
from .batched import PendingCalls, SmallCalls
from .call_statistics import captured_statistics
from .host_transfer import Transfer
from .selection import Selection, grouped, restrict
from .verification import Pending, kept_rows, measure, measured, read, rows_to_check, sample

_TENSORS = tuple("q k v output bias mask sinks scores weights applied undropped scale".split())
_VECTORS = ("q", "k", "v", "output")


class CallRecorder:
    """Makes Calls of kernel calls.

    Args:
        selection: what is kept of each.
        verify: ``"sample"``, ``"full"`` or ``"off"``.
        wait: whether small calls may be derived and measured together, after the kernel ran; else every call is
            delivered as soon as it is kept.
    """

    def __init__(self, selection: Selection, verify: str, wait: bool):
        self.selection, self.verify = selection, verify
        self.fields = tuple(f for f in FIELDS if f in selection.capture)
        self.waiting = PendingCalls("scores" in selection.capture, "weights" in selection.capture, verify)
        self.measured: list[tuple[Call, Pending]] = []
        chosen = selection.heads or selection.queries or selection.dtype or selection.device or selection.statistics
        # With statistics and nothing of the size T·S, nothing of that size is formed, a mask least of all.
        self._lean = bool(selection.statistics) and not {"scores", "weights", "mask"} & selection.capture
        home = not wait or (selection.device is not None and selection.device.type == "cpu")
        self._transfer = Transfer() if home else None
        self._once = TensorMemo()
        self._masks = CompleteMasks(self._once)
        self.small = SmallCalls(selection, self.waiting, self._masks) if wait and not chosen else None
        self.forget = self._once.forget  # a new forward: nothing is shared with the one before

    def split(self, additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Bias and mask of an additive mask, once for a tensor that many layers share."""
        with isolated(additive):
            return self._once("split", additive, lambda: split_additive(additive))  # type: ignore[no-any-return]

    def wants(self, field: str) -> bool:
        """Whether a field was asked for."""
        return field in self.selection.capture

    def keep(self, call: KernelCall, site: Site, step: int, index: int) -> Call:
        """What is kept of one call.

        Raises:
            SelectionError: a selected head or query is not there.
        """
        if self.small is not None and (made := self.small.keep(call, site, step, index)) is not None:
            return made
        with isolated(call.q):
            return self._keep_now(call, site, step, index)

    def deliver(self, call: Call, sink: Callable[[Call], None]) -> None:
        """Hand a kept call over to where it is stored: now, or when it has come from a GPU."""
        if self._transfer is not None and self._transfer.used:
            self._transfer.deliver(call, sink)
        else:
            sink(call)

    def drop(self) -> None:
        """Forget what waits."""
        self.waiting.drop()
        if self._transfer is not None:
            self._transfer.close()

    def settle(self, calls: Sequence[Call]) -> None:
        """Derive what waits, read what was measured into the calls' certificates, wait for what comes from a GPU."""
        self.waiting.settle()
        if self._transfer is not None and self._transfer.used:
            self._transfer.settle(calls)
        pairs, self.measured = self.measured, []
        for (call, _), certificates in zip(pairs, read([(1, p) for _, p in pairs]), strict=True):
            call.certificate = certificates[0]

    def _keep_now(self, call: KernelCall, site: Site, step: int, index: int) -> Call:
        for name in _TENSORS:
            x = getattr(call, name)
            if isinstance(x, Tensor) and x.requires_grad:
                setattr(call, name, x.detach())
        h, t = call.q.shape[1:3]
        heads = self.selection.head_index(h, site.label)
        queries = self.selection.query_index(t, site.label)
        found: dict[str, Tensor | None] = {}
        if self.selection.statistics:
            found, notes = captured_statistics(call, self.selection.statistics, site, heads, queries)
            call.notes = [*call.notes, *notes]
        kept = kept_rows(call, queries) if self._lean and self.verify != "off" else None
        masked = None
        if not self._lean:
            masked = self._masks(call.mask, t, call.k.shape[2], call.diagonal, call.q.device)
        diagonal, rows = None, None
        if devices.on_gpu(call.q) and call.mask is None and call.diagonal.hides_any:
            diagonal, rows = call.diagonal, None if queries is None else kept_rows(call, queries)
        if masked is not None:
            call.mask = masked.mask
        keys = call.k.shape[2]
        groups = restrict(call, heads, queries)
        if masked is None:
            pending, scores, weights = self._check_rows(grouped(call, groups), kept), None, None
        else:
            if heads is not None or queries is not None:
                assert call.mask is not None
                masked = masked._replace(mask=call.mask, real=None if masked.real is None else call.mask)
            pending, scores, weights = self._derive(grouped(call, groups), masked, diagonal, rows)
        if isinstance(call.scale, Tensor):
            call.scale = call.scale.to(self.selection.device or call.scale.device, copy=True)
        made = Call.of(call, site, step, index)
        made.derivable = () if call.opaque else self.selection.derivable
        made.heads = None if heads is None else tuple(heads)
        made.kv_heads = None if groups is None else tuple(groups)
        if queries is not None:
            made.queries, made.of_queries = tuple(range(t)[queries] if isinstance(queries, slice) else queries), t
        ours = {"scores": scores is not call.scores, "weights": weights is not call.weights, "mask": True}
        vectors = self._vectors(call)
        for name in self.fields:
            value = scores if name == "scores" else weights if name == "weights" else getattr(call, name)
            made.fields[name] = vectors[name] if name in vectors else self._keep(name, value, ours.get(name, False))
        if found:
            made.keys = keys
            made.fields.update((name, None if x is None else self._store(x, True)) for name, x in found.items())
        if pending is not None:
            self.measured.append((made, pending))
        return made

    def _check_rows(self, call: KernelCall, kept: Tensor | None) -> Pending | None:
        """The certificate's measurements, from the rows that are checked alone."""
        if kept is None:
            return None
        part, masked = sample(call, kept, self.verify == "full")
        pending, _, _ = self._derive(part, masked)
        return None if pending is None else replace(pending, of_rows=len(kept))

    def _derive(
        self,
        call: KernelCall,
        masked: CompleteMask,
        diagonal: Diagonal | None = None,
        which: Tensor | None = None,
    ) -> tuple[Pending | None, Tensor | None, Tensor | None]:
        """Scores and weights as far as they are wanted, and the certificate's measurements.

        Args:
            call: restricted to what is kept.
            masked: its mask.
            diagonal: what the mask consists of, if that says all of it.
            which: T, which queries of the whole call these are, for ``diagonal``; None: all.
        """
        mask, empty = masked.real, masked.empty
        scores, weights = call.scores, call.weights
        if (scores is None and self.wants("scores")) or (weights is None and self.wants("weights")):
            if scores is None:
                missing = weights is None and self.wants("weights")
                given: dict[str, Any] = {"softcap": call.softcap, "bias": call.bias, "mask": mask, "sinks": call.sinks}
                given |= {"empty": empty, "want_scores": self.wants("scores"), "want_weights": missing}
                given |= {"diagonal": diagonal, "rows": which, "notes": call.notes}
                scores, derived = derive(call.q, call.k, call.scale, **given)
                weights = derived if missing else weights
            else:
                weights = math.softmax_weights(scores, mask, call.sinks, empty)
        if self.verify == "off":
            return None, scores, self._narrow(weights, call)
        b, h, t = call.q.shape[:3]
        rows = rows_to_check(t, self.verify == "full", b * h * t * call.k.shape[2])
        if scores is weights is None and devices.on_gpu(call.q):
            from ..attention.kernels import check

            if (found := check(call, rows, mask, diagonal, which)) is not None:
                return measured(call, rows, found), None, None
        formed = call.scores is not None and not call.opaque  # the model's own: these are compared with q·k
        part = self._scores(call, rows) if scores is None or formed else scores[:, :, rows]
        row_mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        if call.weights is None and weights is not None:
            derived = weights[:, :, rows].to(math.compute_dtype(weights.dtype))
        else:
            sinks = call.sinks
            if sinks is not None and sinks.dim() == 4 and sinks.shape[2] > 1:
                sinks = sinks[:, :, rows]
            derived = math.softmax_weights(part.to(math.compute_dtype(part.dtype)), row_mask, sinks, empty)
        reach = part if row_mask is None else torch.where(row_mask, part, 0.0)
        return measure(call, rows, mask if empty else None, derived, reach), scores, self._narrow(weights, call)

    def _narrow(self, weights: Tensor | None, call: KernelCall) -> Tensor | None:
        """Derived weights in the kernel's dtype, as the kernel would have formed them."""
        return weights if weights is None or call.weights is not None else weights.to(call.dtype)

    def _scores(self, call: KernelCall, rows: slice) -> Tensor:
        def cut(x: Any) -> Any:
            return x[:, :, rows] if isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] > 1 else x

        return math.finish_scores(
            math.dot_scores(call.q[:, :, rows], call.k, cut(call.scale)), call.softcap, cut(call.bias)
        )

    def _vectors(self, call: KernelCall) -> dict[str, Tensor]:
        """Copies of q, k, v and output where they stay what they are."""
        names = [name for name in _VECTORS if name in self.fields and getattr(call, name) is not None]
        several: list[Tensor] = [getattr(call, name) for name in names]
        if self.selection.dtype or self.selection.device or any(devices.on_gpu(x) for x in several):
            return {}
        return dict(zip(names, allocation.copies(several), strict=True))

    def _keep(self, name: str, x: Tensor | None, ours: bool) -> Field:
        if x is None:
            return None
        if name in ("mask", "bias", "sinks"):
            return self._once(("kept", name), x, lambda: self._store(x, ours))  # type: ignore[no-any-return]
        return self._store(x, ours)

    def _store(self, x: Tensor, ours: bool) -> Tensor | Later:
        dtype = self.selection.dtype if x.is_floating_point() and self.selection.dtype is not None else x.dtype
        if self._transfer is not None and devices.on_gpu(x):
            return self._transfer.send(x, dtype, ours)
        device = self.selection.device or x.device
        if dtype != x.dtype or device != x.device:
            return x.to(device=device, dtype=dtype, memory_format=torch.contiguous_format, copy=True)
        return x if ours and x.is_contiguous() else allocation.copies([x])[0]
