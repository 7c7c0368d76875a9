"""From a kernel's arguments to what is kept of the call: selected, derived, measured, copied.

:meth:`CallRecorder.keep` is where a kernel call becomes a :class:`~hookattn.calls.call.Call`: a small one by way of
:mod:`hookattn.recording.batched`, any other at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..attention import functional as math
from ..attention.derivation import derive
from ..attention.kernel_call import FIELD_SPECS, FIELDS, TENSOR_SPECS, KernelCall
from ..attention.masks import CompleteMask, CompleteMasks, Diagonal, split_additive
from ..calls.call import Call
from ..calls.fields import Field, Later
from ..calls.site import Site
from ..torch_internals import allocation, devices
from ..torch_internals.isolation import isolated
from ..torch_internals.tensor_memo import TensorMemo
from .batched import PendingCalls, SmallCallRecorder
from .call_statistics import captured_statistics
from .host_transfer import Transfer
from .selection import Selection, grouped, restrict
from .verification import (
    Measurement,
    checked_part,
    kept_row_indices,
    measurement,
    measurement_of_maxima,
    read_certificates,
    rows_to_check,
)

_VECTORS = tuple(name for name, spec in FIELD_SPECS.items() if spec.is_vectors)

X = TypeVar("X")


class MaskOfCall(NamedTuple):
    """What hides keys in a call that is restricted to what is kept.

    Attributes:
        complete: its complete mask.
        diagonal: what that consists of, if this says all of it: a GPU's kernels then need not read it.
        rows: T, which queries of the whole call these are, for ``diagonal``; None: all.
    """

    complete: CompleteMask
    diagonal: Diagonal | None = None
    rows: Tensor | None = None


class CallRecorder:
    """Makes Calls of kernel calls.

    Args:
        selection: what is kept of each.
        verify: ``"sample"``, ``"full"`` or ``"off"``.
        batches: whether small calls may be derived and measured together, after the kernel ran; else every call is
            delivered as soon as it is kept.
    """

    def __init__(self, selection: Selection, verify: str, batches: bool):
        self.selection, self.verify = selection, verify
        self._fields = tuple(f for f in FIELDS if f in selection.capture)
        self._pending = PendingCalls("scores" in selection.capture, "weights" in selection.capture, verify)
        self._measured: list[tuple[Call, Measurement]] = []
        whole = not (selection.heads or selection.queries or selection.dtype or selection.device)
        # With statistics and nothing of the size T·S, nothing of that size is formed, a mask least of all.
        self._forms_pairs = not selection.statistics or bool({"scores", "weights", "mask"} & selection.capture)
        goes_to_host = not batches or (selection.device is not None and selection.device.type == "cpu")
        self._transfer = Transfer() if goes_to_host else None
        self._memo = TensorMemo()
        self._masks = CompleteMasks(self._memo)
        batches = batches and whole and not selection.statistics
        self.small_calls = SmallCallRecorder(selection, self._pending, self._masks) if batches else None
        self.forget = self._memo.forget  # a new forward: nothing is shared with the one before

    def split(self, additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Bias and mask of an additive mask, once for a tensor that many layers share."""
        with isolated(additive):
            return self._memo("split", additive, lambda: split_additive(additive))  # type: ignore[no-any-return]

    def wants(self, field: str) -> bool:
        """Whether a field was asked for."""
        return field in self.selection.capture

    def keep(self, call: KernelCall, site: Site, step: int, index: int) -> Call:
        """What is kept of one call.

        Raises:
            SelectionError: a selected head or query is not there.
        """
        if self.small_calls is not None and (made := self.small_calls.keep(call, site, step, index)) is not None:
            return made
        with isolated(call.q):
            return self._keep_at_once(call, site, step, index)

    def deliver(self, call: Call, sink: Callable[[Call], None]) -> None:
        """Hand a kept call over to where it is stored: now, or when it has come from a GPU."""
        if self._transfer is not None and self._transfer.used:
            self._transfer.deliver(call, sink)
        else:
            sink(call)

    def drop(self) -> None:
        """Let go of what waits."""
        self._pending.drop()
        if self._transfer is not None:
            self._transfer.close()

    def complete(self, calls: Sequence[Call]) -> None:
        """Derive what waits, read what was measured into the calls' certificates, wait for what comes from a GPU."""
        self._pending.complete()
        if self._transfer is not None and self._transfer.used:
            self._transfer.complete(calls)
        measured, self._measured = self._measured, []
        read = read_certificates([measurement for _, measurement in measured])
        for (call, _), certificates in zip(measured, read, strict=True):
            call.certificate = certificates[0]

    # One call, from its kernel's arguments to its fields

    def _keep_at_once(self, call: KernelCall, site: Site, step: int, index: int) -> Call:
        _detach(call)
        (h, t), s = call.q.shape[1:3], call.k.shape[2]
        heads = self.selection.head_index(h, site.label)
        queries = self.selection.query_index(t, site.label)
        statistics: dict[str, Tensor | None] = {}
        if self.selection.statistics:
            statistics, notes = captured_statistics(call, self.selection.statistics, site, heads, queries)
            call.notes = [*call.notes, *notes]
        # From here on the call has the heads and queries that were selected and no others: nothing is formed of the
        # rest. What has to know where they were in the whole call is made before.
        if self._forms_pairs:
            mask = self._mask_of(call, queries)
            groups = restrict(call, heads, queries)
            if heads is not None or queries is not None:
                assert call.mask is not None  # the complete one, cut down
                real = None if mask.complete.real is None else call.mask
                mask = mask._replace(complete=mask.complete._replace(mask=call.mask, real=real))
            measured, scores, weights = self._derive(grouped(call, groups), mask)
        else:
            rows = kept_row_indices(call, queries) if self.verify != "off" else None
            groups = restrict(call, heads, queries)
            measured, scores, weights = self._measure_rows(grouped(call, groups), rows), None, None
        if isinstance(call.scale, Tensor):
            call.scale = call.scale.to(self.selection.device or call.scale.device, copy=True)
        made = Call.of(call, site, step, index)
        made.derivable = () if call.opaque else self.selection.derivable
        made.heads = None if heads is None else tuple(heads)
        made.kv_heads = None if groups is None else tuple(groups)
        if queries is not None:
            made.queries, made.of_queries = tuple(range(t)[queries] if isinstance(queries, slice) else queries), t
        made.fields = self._kept_fields(call, scores, weights)
        if statistics:
            made.keys = s
            made.fields.update((n, None if x is None else self._kept(x, fresh=True)) for n, x in statistics.items())
        if measured is not None:
            self._measured.append((made, measured))
        return made

    def _mask_of(self, call: KernelCall, queries: Sequence[int] | slice | None) -> MaskOfCall:
        """What hides keys in a whole call, whose ``mask`` becomes the complete one."""
        diagonal, rows = None, None
        if devices.on_gpu(call.q) and call.mask is None and call.diagonal.hides_any:
            diagonal, rows = call.diagonal, None if queries is None else kept_row_indices(call, queries)
        complete = self._masks(call.mask, call.q.shape[2], call.k.shape[2], call.diagonal, call.q.device)
        call.mask = complete.mask
        return MaskOfCall(complete, diagonal, rows)

    # What is derived and measured

    def _measure_rows(self, call: KernelCall, kept: Tensor | None) -> Measurement | None:
        """What the certificate is made of, from the rows that are checked alone.

        Args:
            kept: T, which rows of the whole call these are; None: nothing is to be measured.
        """
        if kept is None:
            return None
        part, complete = checked_part(call, kept, self.verify == "full")
        measured, _, _ = self._derive(part, MaskOfCall(complete))
        return None if measured is None else replace(measured, of_rows=len(kept))

    def _derive(self, call: KernelCall, mask: MaskOfCall) -> tuple[Measurement | None, Tensor | None, Tensor | None]:
        """What the certificate is made of; scores and weights as far as they are wanted."""
        scores, weights = self._scores_and_weights(call, mask)
        measured = None if self.verify == "off" else self._measure(call, mask, scores, weights)
        if weights is not None and call.weights is None:
            weights = weights.to(call.dtype)  # as the kernel would have formed them
        return measured, scores, weights

    def _scores_and_weights(self, call: KernelCall, mask: MaskOfCall) -> tuple[Tensor | None, Tensor | None]:
        """The model's own where it formed them, else derived where they are wanted."""
        scores, weights = call.scores, call.weights
        needs_scores = scores is None and self.wants("scores")
        needs_weights = weights is None and self.wants("weights")
        if needs_weights and scores is not None:
            return scores, math.softmax_weights(scores, mask.complete.real, call.sinks, mask.complete.empty)
        if not needs_scores and not needs_weights:
            return scores, weights
        scores, derived = derive(
            call.q,
            call.k,
            call.scale,
            softcap=call.softcap,
            bias=call.bias,
            mask=mask.complete.real,
            sinks=call.sinks,
            empty=mask.complete.empty,
            want_scores=self.wants("scores"),
            want_weights=needs_weights,
            diagonal=mask.diagonal,
            rows=mask.rows,
            notes=call.notes,
        )
        return scores, derived if needs_weights else weights

    def _measure(
        self, call: KernelCall, mask: MaskOfCall, scores: Tensor | None, weights: Tensor | None
    ) -> Measurement:
        """What the certificate is made of.

        Args:
            scores, weights: of :meth:`_scores_and_weights`, before they are narrowed.
        """
        real, empty = mask.complete.real, mask.complete.empty
        b, h, t = call.q.shape[:3]
        rows = rows_to_check(t, self.verify == "full", b * h * t * call.k.shape[2])
        if scores is weights is None and devices.on_gpu(call.q):
            from ..attention.kernels import check  # what it needs is heavy

            if (found := check(call, rows, real, mask.diagonal, mask.rows)) is not None:
                return measurement_of_maxima(call, rows, found)
        # Scores of the model's own prove nothing about q and k: these are multiplied again, and the product is checked.
        formed = call.scores is not None and not call.opaque
        part = _scores_of_rows(call, rows) if scores is None or formed else scores[:, :, rows]
        row_mask = _rows(real, rows)
        if call.weights is None and weights is not None:
            derived = weights[:, :, rows].to(math.compute_dtype(weights.dtype))
        else:
            wide = part.to(math.compute_dtype(part.dtype))
            derived = math.softmax_weights(wide, row_mask, _rows(call.sinks, rows), empty)
        reachable = part if row_mask is None else torch.where(row_mask, part, 0.0)
        return measurement(call, rows, real if empty else None, derived, reachable)

    # What is stored

    def _kept_fields(self, call: KernelCall, scores: Tensor | None, weights: Tensor | None) -> dict[str, Field]:
        """The fields that were asked for, each so that nobody but the trace writes to it."""
        values = {name: getattr(call, name) for name in self._fields}
        values |= {n: x for n, x in (("scores", scores), ("weights", weights)) if n in values}
        # Made here, so that no second copy is needed.
        fresh = {"scores": scores is not call.scores, "weights": weights is not call.weights, "mask": True}
        copied = self._copies_of_vectors(values)
        made: dict[str, Field] = {}
        for name, x in values.items():
            if x is None or name in copied:
                made[name] = copied.get(name)
            elif FIELD_SPECS[name].shared:
                made[name] = self._memo(("kept", name), x, partial(self._kept, x, fresh.get(name, False)))
            else:
                made[name] = self._kept(x, fresh.get(name, False))
        return made

    def _copies_of_vectors(self, values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Copies of q, k, v and output, where they stay what they are; made together, which is quicker."""
        present = {name: x for name in _VECTORS if (x := values.get(name)) is not None}
        if self.selection.dtype or self.selection.device or any(map(devices.on_gpu, present.values())):
            return {}
        return dict(zip(present, allocation.copies(list(present.values())), strict=True))

    def _kept(self, x: Tensor, fresh: bool) -> Tensor | Later:
        """A tensor as it is stored, in the dtype and on the device that were selected.

        Args:
            fresh: whether it was made for this call, so that it need not be copied.
        """
        dtype = self.selection.dtype if x.is_floating_point() and self.selection.dtype is not None else x.dtype
        if self._transfer is not None and devices.on_gpu(x):
            return self._transfer.send(x, dtype, fresh)
        device = self.selection.device or x.device
        if dtype != x.dtype or device != x.device:
            return x.to(device=device, dtype=dtype, memory_format=torch.contiguous_format, copy=True)
        return x if fresh and x.is_contiguous() else allocation.copies([x])[0]


def _detach(call: KernelCall) -> None:
    """Take its tensors out of the model's graph, which a trace must not keep alive."""
    for name in TENSOR_SPECS:
        x = getattr(call, name)
        if isinstance(x, Tensor) and x.requires_grad:
            setattr(call, name, x.detach())


def _scores_of_rows(call: KernelCall, rows: slice) -> Tensor:
    """B H rows S: the scores of some query rows, from q and k."""
    scores = math.dot_scores(call.q[:, :, rows], call.k, _rows(call.scale, rows))
    return math.finish_scores(scores, call.softcap, _rows(call.bias, rows))


def _rows(x: X, rows: slice) -> X:
    """Some query rows of what is broadcastable to B H T S; whatever has no rows, a number or None, as it is."""
    return x[:, :, rows] if isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] > 1 else x  # type: ignore[return-value]
