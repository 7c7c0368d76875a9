"""Small and plain calls: kept with as little as will do, and derived and measured together with others of their shape.

A model of a few layers spends more time between its kernels than in them; there each step here counts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Size, Tensor

from ..attention.functional import compute_dtype
from ..attention.kernel_call import FIELDS, KernelCall
from ..attention.masks import CompleteMask, CompleteMasks, Diagonal, additive_mask
from ..calls.call import Call
from ..calls.certificate import tolerance
from ..calls.fields import Later
from ..calls.site import Site
from ..torch_internals.isolation import isolated
from .selection import Selection
from .verification import Pending, read, rounding_of, rows_to_check

# Up to this many scores and elements of q, k and v a call is small.
SMALL = 1 << 18

_CONTIGUOUS = torch.contiguous_format
_PLACES = {"q": 0, "k": 1, "v": 2, "output": 3, "mask": 4}


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


class SmallCalls:
    """Makes Calls of small kernel calls.

    Args:
        selection: what is kept of each: fields alone, whole and as they are.
        waiting: where they wait.
        masks: makes their masks.
    """

    def __init__(self, selection: Selection, waiting: PendingCalls, masks: CompleteMasks):
        self._fields = [(f, _PLACES.get(f, 5)) for f in FIELDS if f in selection.capture]
        self._outputs = waiting.verify != "off" or "output" in selection.capture
        self._derivable, self._masks = selection.derivable, masks
        self._waiting = waiting if waiting.wanted else None

    def keep(self, call: KernelCall, site: Site, step: int, index: int) -> Call | None:
        """What is kept of one call; None: it is none of these."""
        output, scale = call.output, call.scale
        if not (
            output is not None
            and type(scale) is float
            and call.bias is call.weights is call.scores is call.sinks is None
            and call.undropped is call.outer_error is None
            and call.softcap is None
            and call.softmax_dtype in (None, call.q.dtype)
            and not call.opaque
        ):
            return None
        several = call.q, call.k, call.v, output
        if (shape := shape_of(several, scale)) is None:
            return None
        masked = self._masks(call.mask, shape.t, shape.s, call.diagonal, call.q.device)
        return self._fill(Call.of(call, site, step, index), several, scale, masked)

    def keep_plain(
        self,
        several: tuple[Tensor, Tensor, Tensor, Tensor],
        scale: float,
        causal: bool,
        tap: str,
        site: Site,
        step: int,
        index: int,
    ) -> Call | None:
        """The same of a kernel that was given nothing but ``several`` (q, k, v; and its output), scale and causal."""
        if (shape := shape_of(several, scale)) is None:
            return None
        masked = self._masks(None, shape.t, shape.s, Diagonal(causal), several[0].device)
        return self._fill(Call(site, step, index, tap, shape.dtype, scale, None, causal), several, scale, masked)

    def _fill(
        self, made: Call, several: tuple[Tensor, Tensor, Tensor, Tensor], scale: float, masked: CompleteMask
    ) -> Call:
        q, k, v, output = several
        grad = torch.is_grad_enabled()
        if grad:
            torch._C._set_grad_enabled(False)
        own = [x.clone(memory_format=_CONTIGUOUS) for x in (q, k, v)]
        kept = output.clone(memory_format=_CONTIGUOUS) if self._outputs else None
        if grad:
            torch._C._set_grad_enabled(True)
        values = (*own, kept, masked.mask, None)
        made.fields = {name: values[i] for name, i in self._fields}
        made.derivable = self._derivable
        if self._waiting is not None:
            if kept is not None:
                own.append(kept)
            self._waiting.add(PendingCall(made, own, masked, scale, tolerance(made.dtype)))
        return made


def shape_of(several: tuple[Tensor, Tensor, Tensor, Tensor], scale: float) -> Shape | None:
    """What a call of q, k, v and output has in common with others; None: it is not small, or not plain."""
    q, k, v, output = several
    if not (type(q) is type(k) is type(v) is type(output) is Tensor) or not scale or _modes():
        return None
    shape = _shape(q.shape, k.shape, v.shape, output.shape, q.dtype, k.dtype, v.dtype, output.dtype)
    return None if shape is None or shape.size > SMALL else shape


_modes = torch._C._len_torch_function_stack


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
_LIMIT = 1 << 23


@dataclass(slots=True)
class PendingCall:
    """One plain call that waits: no bias, sinks, soft-cap, dropout or weights of the model's own.

    Attributes:
        call: gets its scores, weights and certificate.
        own: q B H T D, k B G S D, v B G S E, and output B H T E if it is measured; ours, so that nobody writes to them.
        masked: the mask.
        scale: the kernel's own.
        unit: the allowed distance per unit.
    """

    call: Call
    own: list[Tensor]
    masked: CompleteMask
    scale: float
    unit: float

    def key(self) -> tuple[object, ...]:
        """Calls of one key go together."""
        q, k, v = self.own[:3]
        return q.shape, k.shape, v.shape, q.dtype, q.device, id(self.masked.real), self.scale, self.unit


class PendingCalls:
    """The small calls of a trace that wait.

    Args:
        scores: whether scores are wanted.
        weights: whether weights are wanted.
        verify: ``"sample"``, ``"full"`` or ``"off"``.
    """

    def __init__(self, scores: bool, weights: bool, verify: str):
        self.scores, self.weights, self.verify = scores, weights, verify
        self._measured: list[tuple[Sequence[PendingCall], Pending]] = []
        self._calls: list[PendingCall] = []
        self._size = 0

    @property
    def wanted(self) -> bool:
        """Whether there is anything to derive or measure."""
        return self.scores or self.weights or self.verify != "off"

    def add(self, small: PendingCall) -> None:
        """One more call."""
        self._calls.append(small)
        b, h, t, _ = small.own[0].shape
        self._size += b * h * t * small.own[1].shape[2]
        if self.scores:
            small.call.fields["scores"] = Later(self._field, small.call, "scores")
        if self.weights:
            small.call.fields["weights"] = Later(self._field, small.call, "weights")
        if self._size > _LIMIT:
            self.flush()

    def _field(self, call: Call, name: str) -> Tensor:
        """For who reads a call before the trace is over."""
        self.flush()
        value = call.fields[name]
        assert isinstance(value, Tensor)
        return value

    def drop(self) -> None:
        """Forget what waits: the block raised."""
        for small in self._calls:
            for name in ("scores", "weights"):
                small.call.fields.pop(name, None)
        self._calls.clear()

    def settle(self) -> None:
        """Derive and measure what waits, and read the measurements into the calls' certificates."""
        self.flush()
        again: list[Sequence[PendingCall]] = []
        while self._measured:
            pairs, self._measured = self._measured, []
            made = read([(len(calls), pending) for calls, pending in pairs])
            for (calls, _), certificates in zip(pairs, made, strict=True):
                for small, certificate in zip(calls, certificates, strict=True):
                    small.call.certificate = certificate
                if calls not in again and not all(c.faithful for c in certificates):
                    again.append(calls)
                    with isolated(calls[0].own[0]):
                        self._derive(calls, careful=True)

    def flush(self) -> None:
        """Derive and measure what waits."""
        calls, self._calls, self._size = self._calls, [], 0
        groups: dict[tuple[object, ...], list[PendingCall]] = {}
        for small in calls:
            groups.setdefault(small.key(), []).append(small)
        for several in groups.values():
            with isolated(several[0].own[0]):
                self._derive(several)

    def _derive(self, several: Sequence[PendingCall], careful: bool = False) -> None:
        """N calls of one shape at once, with as few operations as will do.

        The mask is added to the scores as −∞, which is quicker than choosing, and the size of the scores is not looked
        at. Where that finds a call unfaithful, ``careful`` chooses, and allows for the rounding of large scores.
        """
        first, n = several[0], len(several)
        (b, h, t, d), (g, s), e = first.own[0].shape, first.own[1].shape[1:3], first.own[2].shape[3]
        dtype, mask, measured = first.own[0].dtype, first.masked.real, self.verify != "off"
        empty, hidden = first.masked.empty, first.masked.hidden
        count = 4 if measured else 3
        parts = [torch.cat([c.own[i] for c in several]) for i in range(count)] if n > 1 else first.own[:count]
        wide = compute_dtype(dtype)
        if wide != dtype:
            parts = [x.to(wide) for x in parts]
        q, k = parts[0], parts[1].view(n * b * g, s, d)
        rows = rows_to_check(t, self.verify == "full", b * h * t * s)
        whole = self.scores or self.weights or rows == slice(0, t, 1)
        if not whole:
            q = q[:, :, rows]
            mask, hidden = (x if x is None or x.shape[2] == 1 else x[:, :, rows] for x in (mask, hidden))
        q = q.reshape(n * b * g, -1, d)
        scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=first.scale).view(n, b, h, -1, s)
        if self.scores:
            for small, own in zip(several, scores.unbind(), strict=True):
                small.call.fields["scores"] = own
        if not self.weights and not measured:
            return
        reach = None
        if careful:
            seen = scores if mask is None else torch.where(mask, scores, 0.0)
            reach = seen.abs().view(n, -1).amax(1)
        if mask is not None:
            if careful:
                scores = torch.where(mask, scores, -torch.inf)
            else:
                hidden = additive_mask(mask) if hidden is None else hidden
                scores = scores + hidden if self.scores else scores.add_(hidden)
        weights = torch.softmax(scores, -1)
        if empty and mask is not None:
            weights.masked_fill_(~mask.any(-1, keepdim=True), 0.0)
        if self.weights:
            for small, own in zip(several, (weights if wide == dtype else weights.to(dtype)).unbind(), strict=True):
                small.call.fields["weights"] = own
        if not measured:
            return
        output = parts[3].view(n, b, h, t, e)
        if rows != slice(0, t, 1):
            output = output[:, :, :, rows]
            if whole:
                weights = weights[:, :, :, rows]
                mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        gap = torch.bmm(weights.reshape(n * b * g, -1, s), parts[2].view(n * b * g, s, e)).view(output.shape)
        gap, excess = gap.sub_(output), weights.sum(-1).sub_(1)
        if empty and mask is not None:
            live = mask.any(-1, keepdim=True)
            gap, excess = torch.where(live, gap, 0.0), torch.where(live[..., 0], excess, 0.0)
        found = excess.abs_().view(n, -1), gap.abs_().view(n * b * h, -1), parts[2].abs().view(n * b * g, -1)
        most = [x.amax(1) for x in found]
        if reach is not None:
            most.insert(1, reach)
        pending = Pending(torch.cat(most), (b * h, b * g), first.unit, output.shape[3], t)
        if reach is not None:
            pending.rounding = rounding_of(dtype, False)
        self._measured.append((several, pending))
