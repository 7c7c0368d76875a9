"""How a certificate is measured: some rows of a call are rebuilt and held against what the model's kernel returned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention.functional import compute_dtype, weighted_values
from ..attention.kernel_call import KernelCall
from ..attention.masks import CompleteMask
from ..calls.certificate import Certificate, tolerance
from .selection import restrict

SAMPLE = 8


ALL = 1 << 14  # up to this many scores, leaving rows out would cost more than it saves


_LEAST = 1e-3  # no head is held to more than this of a unit, however small its values


@dataclass(slots=True)
class Pending:
    """N calls of one shape, measured but not yet read from the device: reading waits until the forward is over.

    Attributes:
        values: 1-D: N row-sum excesses, N weights errors if the model formed weights of its own, N largest ``|score|``
            if ``rounding`` is not 0, then for each call its output errors, then for each call the largest ``|v|`` that
            they are held against.
        counts: how many output errors a call has (one for each batch entry and head, or one), and how many ``|v|``.
        unit: the allowed distance per unit, from :data:`TOLERANCE`.
        rows: query rows checked, of ``of_rows``.
        formed: whether the model formed weights of its own.
        basis: what the rebuilt output was compared with.
        rounding: what is allowed beside ``unit``, in units of the largest score: rounding it moves every weight.
    """

    values: Tensor
    counts: tuple[int, int]
    unit: float
    rows: int
    of_rows: int
    formed: bool = False
    basis: str = "output"
    rounding: float = 0.0

    def settle(self, n: int, values: list[float]) -> list[Certificate]:
        """The certificates of the N calls, from the values of ``values``."""
        errors, sizes = self.counts
        scores = 2 * n if self.formed else n
        start = scores + n if self.rounding else scores
        then = start + n * errors
        made = []
        for i in range(n):
            found = (
                values[i],
                values[n + i] if self.formed else None,
                values[start + i * errors : start + (i + 1) * errors],
                values[then + i * sizes : then + (i + 1) * sizes],
            )
            certificate = self._certify(self.unit, *found)
            if self.rounding and not certificate.faithful and math.isfinite(values[scores + i]):
                certificate = self._certify(self.unit + self.rounding * values[scores + i], *found)
            made.append(certificate)
        return made

    def _certify(
        self, unit: float, excess: float, weights: float | None, errors: list[float], sizes: list[float]
    ) -> Certificate:
        """One certificate; its output error is that of the head that is worst off for the size of its values."""
        bounds = [unit * max(size, _LEAST) for size in sizes] or [unit * _LEAST]
        if len(errors) < len(bounds):
            bounds = [max(bounds)]
        per = max(len(errors) // len(bounds), 1)  # query heads of one key head
        worst, output, tolerance = -1.0, 0.0, max(bounds)
        for i, error in enumerate(errors):
            bound = bounds[i // per]
            if not error / bound <= worst:  # NaN is worse than anything
                worst, output, tolerance = error / bound, error, bound
                if math.isnan(error):
                    break
        good = output <= tolerance and (weights is None or weights <= unit) and excess <= 4 * unit  # NaN fails
        return Certificate(
            "faithful" if good else "unfaithful",
            output,
            weights,
            excess,
            tolerance,
            unit,
            self.rows,
            self.of_rows,
            self.basis,
        )


def rows_to_check(t: int, full: bool, scores: int | None = None) -> slice:
    """All rows, or some that are spread evenly and include the last; all of a call that has few ``scores``."""
    if full or t <= SAMPLE or (scores is not None and scores <= ALL):
        return slice(0, t, 1)
    step = -(-t // SAMPLE)
    return slice((t - 1) % step, t, step)


def measure(call: KernelCall, rows: slice, mask: Tensor | None, derived: Tensor, scores: Tensor) -> Pending:
    """Compare what was rebuilt with what the kernel returned.

    Args:
        call: the call, restricted to what is captured.
        rows: the query rows that are checked.
        mask: the complete mask, broadcastable to B H T S.
        derived: B H rows S, weights derived from q, k, bias, mask and sinks.
        scores: B H rows S, the scores that they were derived from; 0 where the mask hides them.
    """
    t = call.q.shape[2]
    reference, basis = call.output, "output"
    if call.undropped is not None:
        reference, basis = call.undropped, "the kernel rerun without dropout"
    own = None if call.weights is None else call.weights[:, :, rows]
    used = derived if own is None else own if call.applied is None else call.applied[:, :, rows]
    wide = compute_dtype(call.q.dtype)
    live = None if mask is None else (mask[:, :, rows] if mask.shape[2] > 1 else mask).any(-1, keepdim=True)
    if call.outer_error is not None:
        errors, basis = call.outer_error.to(wide).reshape(1), "what the fused layer returned"
    elif reference is None:
        errors, basis = derived.new_zeros(1), "nothing: the kernel's output was not seen"
    else:
        gap = weighted_values(used.to(wide), call.v) - reference[:, :, rows]
        errors = largest(gap, live, 2).flatten()
    total = (derived if own is None else own.to(wide)).sum(-1, keepdim=True) - 1
    if not derived.shape[-1]:
        total = total.new_zeros((1,) * 4)  # no keys: no row has anything to attend to
    excess = largest(total if call.sinks is None else total.clamp_min(0), live)
    v = call.v if call.v.shape[0] == call.q.shape[0] else call.v.expand(call.q.shape[0], -1, -1, -1)
    finite = torch.nan_to_num(v.to(wide), 0.0, 0.0, 0.0)  # the value of a key that nobody attends to may be anything
    sizes = largest(finite, None, 2).flatten()
    weights_error = [] if own is None else [largest(derived - own, live).to(wide)]
    reach = largest(scores, None).to(wide)
    values = torch.cat([excess, *weights_error, reach, errors.to(wide), sizes])
    counts, checked, formed = (errors.numel(), sizes.numel()), len(range(*rows.indices(t))), own is not None
    return Pending(values, counts, unit_of(call), checked, t, formed, basis, rounding_of(call.dtype, formed))


def measured(call: KernelCall, rows: slice, found: Tensor) -> Pending:
    """What :func:`measure` returns, of a call that forms neither scores nor weights of its own.

    Args:
        call, rows: as there.
        found: 4, B·H: excess of row sums, largest score, largest error and largest value of each batch entry and head.
    """
    (b, h, t), g = call.q.shape[:3], call.k.shape[1]
    sizes = found[3] if g == h else found[3].view(b * g, h // g).amax(1)
    values = torch.cat([found[:2].amax(1), found[2], sizes])
    counts, checked = (b * h, b * g), len(range(*rows.indices(t)))
    return Pending(values, counts, unit_of(call), checked, t, rounding=rounding_of(call.dtype, False))


def read(pending: Sequence[tuple[int, Pending]]) -> list[list[Certificate]]:
    """The certificates of what was measured, each with the number of its calls; one transfer for each device."""
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, (_, one) in enumerate(pending):
        places.setdefault((one.values.device, one.values.dtype), []).append(i)
    made: dict[int, list[Certificate]] = {}
    for several in places.values():
        parts = [pending[i][1].values for i in several]
        flat: list[float] = (parts[0] if len(parts) == 1 else torch.cat(parts)).tolist()
        start = 0
        for i, part in zip(several, parts, strict=True):
            n, one = pending[i]
            made[i] = one.settle(n, flat[start : start + part.numel()])
            start += part.numel()
    return [made[i] for i in range(len(pending))]


def unit_of(call: KernelCall) -> float:
    """The allowed distance per unit, by the narrowest dtype that was computed in."""
    dtypes = {call.q.dtype, call.v.dtype, call.softmax_dtype or call.q.dtype}
    if call.weights is not None:
        dtypes.add(call.weights.dtype)
    return max(map(tolerance, dtypes))


def rounding_of(dtype: torch.dtype, formed: bool) -> float:
    """How far the rounding of a score of 1 may move a weight: a fused kernel has its scores in float32 at least."""
    return 2 * torch.finfo(dtype if formed else compute_dtype(dtype)).eps


def largest(x: Tensor, live: Tensor | None, keep: int = 0) -> Tensor:
    """Max abs over all dimensions after the first ``keep``, of rows that have something to attend to; 1-D for none."""
    if live is not None:
        x = torch.where(live, x, 0.0)
    if not x.numel():
        return x.new_zeros(x.shape[:keep] if keep else 1)
    return x.abs().flatten(keep).amax(keep) if keep else x.abs().amax().reshape(1)


def kept_rows(call: KernelCall, queries: Sequence[int] | slice | None) -> Tensor:
    """T: which rows of a whole call a selection keeps."""
    rows = torch.arange(call.q.shape[2], device=call.q.device)
    return rows if queries is None else rows[queries] if isinstance(queries, slice) else rows[list(queries)]


def sample(call: KernelCall, kept: Tensor, full: bool) -> tuple[KernelCall, CompleteMask]:
    """The rows of a call that are checked, with the complete mask of these rows alone.

    Args:
        call: restricted to what is kept; its mask is what the kernel was given.
        kept: T, the query rows that it was restricted to.
        full: whether all rows are checked.
    """
    own, device = replace(call), call.q.device
    rows = rows_to_check(call.q.shape[2], full)
    restrict(own, None, rows)
    mask = own.mask
    if call.diagonal.hides_any:
        seen = call.diagonal.allows(kept[rows], slice(0, call.k.shape[2]))[None, None]
        mask = seen if mask is None else mask.bool() & seen
    elif mask is not None:
        mask = mask.bool()
    whole = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device) if mask is None else mask
    return own, CompleteMask(whole, mask, mask is not None and not bool(mask.any(-1).all()))
