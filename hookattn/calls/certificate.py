"""The certificate of a call: the measured distance between what was rebuilt and what the model's kernel returned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.functional import compute_dtype, weighted_values
from ..attention.kernel_call import KernelCall

# Allowed distance in units of the largest |v| (output) and of 1 (weights), by the dtype the kernel ran in: a few times
# the rounding of the longest sum that occurs; a wrong mask, scale or head order is off by orders of magnitude more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
SAMPLE = 8
ALL = 1 << 14  # up to this many scores, leaving rows out would cost more than it saves
_LEAST = 1e-3  # no head is held to more than this of a unit, however small its values


@dataclass(frozen=True, slots=True)
class Certificate:
    """How faithful one call is.

    Attributes:
        status: ``faithful``, ``unfaithful``, or ``unverified`` (verification was off).
        output_error: max abs error of weights·v against the kernel's own output, of the head that is furthest from it
            for the size of its values.
        weights_error: max abs error of the derived weights against the model's own; None where it forms none.
        row_sum_error: max distance of a row sum from 1 (with sinks: above 1).
        tolerance: the bound for ``output_error``.
        weights_tolerance: the bound for ``weights_error`` and ``row_sum_error``.
        rows: query rows checked, of ``of_rows``, in every batch entry and head that was captured.
        basis: what the rebuilt output was compared with.
    """

    status: str
    output_error: float
    weights_error: float | None
    row_sum_error: float
    tolerance: float
    weights_tolerance: float
    rows: int
    of_rows: int
    basis: str = "output"

    @property
    def faithful(self) -> bool:
        """Whether everything that was measured is within tolerance."""
        return self.status == "faithful"

    @property
    def max_error(self) -> float:
        """The largest error that was measured."""
        errors = (self.output_error, self.weights_error or 0.0, self.row_sum_error)
        return max(errors, key=lambda e: (math.isnan(e), e))

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        weights = "" if self.weights_error is None else f", weights {self.weights_error:.1e}"
        return (
            f"{self.status}: {self.basis} {self.output_error:.1e} of {self.tolerance:.1e}{weights}, "
            f"{self.rows} of {self.of_rows} rows"
        )


UNVERIFIED = Certificate("unverified", 0.0, None, 0.0, 0.0, 0.0, 0, 0, "nothing")


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


def tolerance(dtype: torch.dtype) -> float:
    """The allowed distance per unit of what was computed in a dtype."""
    return TOLERANCE.get(dtype, TOLERANCE[torch.float16])


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
