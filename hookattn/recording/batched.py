"""Small and plain calls: kept with as little as will do, and derived and measured together with others of their shape.

A model of a few layers spends more time between its kernels than in them. So at capture time a small call is copied and
no more (:class:`SmallCallRecorder`), and waits (:class:`PendingCalls`) for what can be made later, of many at once.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Size, Tensor

from ..attention.kernel_call import FIELDS, KernelCall
from ..attention.masks import CompleteMask, CompleteMasks, Diagonal
from ..calls.call import Call
from ..calls.certificate import tolerance
from ..calls.fields import Later
from ..calls.site import Site
from ..errors import FieldNotCaptured
from ..torch_internals.function_modes import depth
from ..torch_internals.isolation import isolated, set_grad_enabled
from .selection import Selection
from .stacked import StackedCalls
from .verification import Measurement, read_certificates, rows_to_check, score_rounding

# Up to this many scores and elements of q, k and v a call is small: Python takes longer than its arithmetic.
SMALL = 1 << 18

Vectors = tuple[Tensor, Tensor, Tensor, Tensor]
"""q B H T D, k B G S D, v B G S E and output B H T E of a kernel."""

_CONTIGUOUS = torch.contiguous_format
# A small call has these fields and no other, in the order in which :meth:`SmallCallRecorder._copied` has their values.
_HAS = ("q", "k", "v", "output", "mask")
_others = operator.attrgetter(*(name for name in FIELDS if name not in _HAS))


class Shape(NamedTuple):
    """What small calls of one shape have in common.

    Attributes:
        dtype: of q, k, v and output.
        t, s: queries and keys.
        size: the most elements of q, k, v or the scores.
    """

    dtype: torch.dtype
    t: int
    s: int
    size: int


class SmallCallRecorder:
    """Makes Calls of small kernel calls.

    Args:
        selection: what is kept of each: fields alone, whole and as they are.
        pending: where they wait.
        masks: makes their masks.
    """

    def __init__(self, selection: Selection, pending: PendingCalls, masks: CompleteMasks):
        self._fields = [(f, _HAS.index(f) if f in _HAS else len(_HAS)) for f in FIELDS if f in selection.capture]
        self._needs_output = pending.verify != "off" or "output" in selection.capture
        self._derivable, self._masks = selection.derivable, masks
        self._pending = pending if pending.wanted else None

    def keep(self, call: KernelCall, site: Site, step: int, index: int) -> Call | None:
        """What is kept of one call; None: it is none of these."""
        output, scale = call.output, call.scale
        if not (
            output is not None
            and type(scale) is float
            and all(x is None for x in _others(call))
            and call.undropped is call.outer_error is None
            and call.softcap is None
            and call.softmax_dtype in (None, call.q.dtype)
            and not call.opaque
        ):
            return None
        vectors = call.q, call.k, call.v, output
        if (shape := small_shape(vectors, scale)) is None:
            return None
        masked = self._masks(call.mask, shape.t, shape.s, call.diagonal, call.q.device)
        return self._copied(Call.of(call, site, step, index), vectors, scale, masked)

    def keep_vectors(
        self,
        vectors: Vectors,
        scale: float,
        causal: bool,
        tap: str,
        site: Site,
        step: int,
        index: int,
    ) -> Call | None:
        """The same of a kernel that was given nothing but q, k, v, scale and causal, without a KernelCall made of them.

        Without this way a trace of 4 layers of width 64 and 32 tokens takes 4 % more time (5 % where q, k and v alone
        are kept): that is what making the KernelCall and looking through it costs.
        """
        if (shape := small_shape(vectors, scale)) is None:
            return None
        masked = self._masks(None, shape.t, shape.s, Diagonal(causal), vectors[0].device)
        return self._copied(Call(site, step, index, tap, shape.dtype, scale, None, causal), vectors, scale, masked)

    def _copied(self, made: Call, vectors: Vectors, scale: float, masked: CompleteMask) -> Call:
        """``made`` with its fields: copies, since the model may write to its tensors; what is derived follows later."""
        q, k, v, output = vectors
        # By hand: torch's context manager takes 3 µs, as much as one of the copies.
        grad = torch.is_grad_enabled()
        if grad:
            set_grad_enabled(False)
        copies = [x.clone(memory_format=_CONTIGUOUS) for x in (q, k, v)]
        kept = output.clone(memory_format=_CONTIGUOUS) if self._needs_output else None
        if grad:
            set_grad_enabled(True)
        values = (*copies, kept, masked.mask, None)
        made.fields = {name: values[i] for name, i in self._fields}
        made.derivable = self._derivable
        if self._pending is not None:
            if kept is not None:
                copies.append(kept)
            self._pending.add(PendingCall(made, copies, masked, scale, tolerance(made.dtype)))
        return made


def small_shape(vectors: Vectors, scale: float) -> Shape | None:
    """What a call of q, k, v and output has in common with others; None: it is not small, or not plain."""
    q, k, v, output = vectors
    # depth: function modes that are open, the user's own, would see our copies.
    if not (type(q) is type(k) is type(v) is type(output) is Tensor) or not scale or depth():
        return None
    shape = _shape(q.shape, k.shape, v.shape, output.shape, q.dtype, k.dtype, v.dtype, output.dtype)
    return None if shape is None or shape.size > SMALL else shape


# Cached, as the layers of a model mostly share one shape: 0.2 µs in place of 3 a call.
@functools.lru_cache(maxsize=1024)
def _shape(q: Size, k: Size, v: Size, output: Size, *dtypes: torch.dtype) -> Shape | None:
    if len(set(dtypes)) > 1 or not len(q) == len(k) == len(v) == len(output) == 4:
        return None
    (b, h, t, d), s, e = q, k[2], v[3]
    good = output == (b, h, t, e) and k[0] == b and k[3] == d and v[:3] == k[:3] and k[1] and h % k[1] == 0
    sizes = k.numel(), v.numel(), q.numel(), b * h * t * s
    if not good or not all(sizes):
        return None
    return Shape(dtypes[0], t, s, max(sizes))


# So many scores may wait; then they are derived whether the forward is over or not.
_MOST_SCORES = 1 << 23


@dataclass(slots=True)
class PendingCall:
    """One plain call that waits: no bias, sinks, soft-cap, dropout or weights of the model's own.

    Attributes:
        call: gets its scores, weights and certificate.
        tensors: q B H T D, k B G S D, v B G S E, and output B H T E if it is measured: copies, so that nobody writes to
            them while the call waits.
        masked: the mask.
        scale: the kernel's own.
        tolerance: the allowed distance per unit.
    """

    call: Call
    tensors: list[Tensor]
    masked: CompleteMask
    scale: float
    tolerance: float

    def key(self) -> tuple[object, ...]:
        """Calls of one key can be stacked."""
        q, k, v = self.tensors[:3]
        return q.shape, k.shape, v.shape, q.dtype, q.device, id(self.masked.real), self.scale, self.tolerance


class PendingCalls:
    """The small calls of a trace whose scores, weights and certificates are still to be made.

    They wait because what is made costs several operations a call, and calls of one shape take as many together as one
    alone. They wait until a field is read, until there are too many, or until the trace ends.

    Args:
        scores: whether scores are wanted.
        weights: whether weights are wanted.
        verify: ``"sample"``, ``"full"`` or ``"off"``.
    """

    def __init__(self, scores: bool, weights: bool, verify: str):
        self.scores, self.weights, self.verify = scores, weights, verify
        self._fields = [name for name, wanted in (("scores", scores), ("weights", weights)) if wanted]
        self._measured: list[tuple[Sequence[PendingCall], Measurement]] = []
        self._calls: list[PendingCall] = []
        self._size = 0

    @property
    def wanted(self) -> bool:
        """Whether there is anything to derive or measure."""
        return self.scores or self.weights or self.verify != "off"

    def add(self, pending: PendingCall) -> None:
        """One more call."""
        self._calls.append(pending)
        b, h, t, _ = pending.tensors[0].shape
        self._size += b * h * t * pending.tensors[1].shape[2]
        for name in self._fields:
            pending.call.fields[name] = Later(self._field, pending.call, name)
        if self._size > _MOST_SCORES:
            self.flush()

    def _field(self, call: Call, name: str) -> Tensor:
        """For who reads a call before the trace is over."""
        self.flush()
        value = call.fields[name]
        return value if isinstance(value, Tensor) else _given_up(call.site.label, name)

    def drop(self) -> None:
        """Let go of what waits, as the block raised. What cannot be derived from other fields says so when read."""
        for pending in self._calls:
            call = pending.call
            for name in self._fields:
                if name in call.derivable:
                    del call.fields[name]
                else:
                    # Not _field: the call would hold all that waits, and all that waits the call.
                    call.fields[name] = Later(_given_up, call.site.label, name)
        self._calls.clear()

    def complete(self) -> None:
        """Derive and measure what waits, and read the measurements into the calls' certificates."""
        self.flush()
        repeated: list[Sequence[PendingCall]] = []
        while self._measured:
            measured, self._measured = self._measured, []
            read = read_certificates([measurement for _, measurement in measured])
            for (several, _), certificates in zip(measured, read, strict=True):
                for pending, certificate in zip(several, certificates, strict=True):
                    pending.call.certificate = certificate
                # The quick way may be at fault, not the call. So the careful way is taken once, and has the last word.
                if several not in repeated and not all(c.faithful for c in certificates):
                    repeated.append(several)
                    with isolated(several[0].tensors[0]):
                        self._derive(several, careful=True)

    def flush(self) -> None:
        """Derive and measure what waits."""
        calls, self._calls, self._size = self._calls, [], 0
        groups: dict[tuple[object, ...], list[PendingCall]] = {}
        for pending in calls:
            groups.setdefault(pending.key(), []).append(pending)
        for several in groups.values():
            with isolated(several[0].tensors[0]):
                self._derive(several)

    def _derive(self, several: Sequence[PendingCall], careful: bool = False) -> None:
        """N calls of one key at once, with as few operations as will do.

        The mask is added to the scores as −∞, which is quicker than choosing, and the size of the scores is not looked
        at. Where that finds a call unfaithful, ``careful`` chooses, and allows for the rounding of large scores.
        """
        first, measures, keeps = several[0], self.verify != "off", bool(self._fields)
        dtype, (b, h, t, _), s = first.tensors[0].dtype, first.tensors[0].shape, first.tensors[1].shape[2]
        calls = StackedCalls.of([p.tensors[: 4 if measures else 2] for p in several], first.masked, first.scale)
        rows = rows_to_check(t, self.verify == "full", b * h * t * s)
        if not keeps:
            calls = calls.of_rows(rows)
        scores = calls.scores()
        if self.scores:
            _give(several, "scores", scores)
        if not self.weights and not measures:
            return
        largest = calls.largest_scores(scores) if careful else None
        weights = calls.weights(scores, careful, in_place=not self.scores)
        if self.weights:
            _give(several, "weights", weights.to(dtype))
        if measures:
            checked = calls.of_rows(rows) if keeps else calls
            maxima = checked.maxima(weights if checked is calls else weights[:, :, :, rows], largest)
            rounding = score_rounding(dtype, False) if careful else 0.0
            n = checked.q.shape[2]
            self._measured.append((several, Measurement.of(maxima, first.tolerance, n, t, rounding=rounding)))


def _give(several: Sequence[PendingCall], name: str, values: Tensor) -> None:
    """Each of N calls its part of N B H T S."""
    for pending, value in zip(several, values.unbind(), strict=True):
        pending.call.fields[name] = value


def _given_up(label: str, name: str) -> Tensor:
    raise FieldNotCaptured(
        f"{name!r} of {label} was still to be derived when the traced block raised, and was given up. It can be had if "
        f"q, k, bias, mask and sinks are captured, or if the block ends."
    )
