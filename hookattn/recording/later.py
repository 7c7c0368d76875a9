"""Small calls, derived and measured together after the kernel ran: what costs is the number of operations, not their
size, and calls of one shape (the layers of a model) take one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.functional import compute_dtype
from ..attention.masks import Masked, additive
from ..calls.call import Call
from ..calls.fields import Later
from ..torch_internals.isolation import Quiet
from .verification import Pending, read, rounding_of, rows_to_check

# So many scores may wait; then they are derived whether the forward is over or not.
_LIMIT = 1 << 23


@dataclass(slots=True)
class Small:
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
    masked: Masked
    scale: float
    unit: float

    def key(self) -> tuple[object, ...]:
        """Calls of one key go together."""
        q, k, v = self.own[:3]
        return q.shape, k.shape, v.shape, q.dtype, q.device, id(self.masked.real), self.scale, self.unit


class Waiting:
    """The small calls of a trace that wait.

    Args:
        scores: whether scores are wanted.
        weights: whether weights are wanted.
        verify: ``"sample"``, ``"full"`` or ``"off"``.
    """

    def __init__(self, scores: bool, weights: bool, verify: str):
        self.scores, self.weights, self.verify = scores, weights, verify
        self._measured: list[tuple[Sequence[Small], Pending]] = []
        self._calls: list[Small] = []
        self._size = 0

    @property
    def wanted(self) -> bool:
        """Whether there is anything to derive or measure."""
        return self.scores or self.weights or self.verify != "off"

    def add(self, small: Small) -> None:
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
        again: list[Sequence[Small]] = []
        while self._measured:
            pairs, self._measured = self._measured, []
            made = read([(len(calls), pending) for calls, pending in pairs])
            for (calls, _), certificates in zip(pairs, made, strict=True):
                for small, certificate in zip(calls, certificates, strict=True):
                    small.call.certificate = certificate
                if calls not in again and not all(c.faithful for c in certificates):
                    again.append(calls)
                    with Quiet(calls[0].own[0]):
                        self._derive(calls, careful=True)

    def flush(self) -> None:
        """Derive and measure what waits."""
        calls, self._calls, self._size = self._calls, [], 0
        groups: dict[tuple[object, ...], list[Small]] = {}
        for small in calls:
            groups.setdefault(small.key(), []).append(small)
        for several in groups.values():
            with Quiet(several[0].own[0]):
                self._derive(several)

    def _derive(self, several: Sequence[Small], careful: bool = False) -> None:
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
                hidden = additive(mask) if hidden is None else hidden
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
