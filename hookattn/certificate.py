"""The certificate of a call: the measured distance between what was rebuilt and what the model's kernel returned."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import compute_dtype, dot_scores, softmax_weights, weighted_values
from .record import KernelCall

# Allowed distance in units of the largest |v| (output) and of 1 (weights), by the dtype the kernel ran in: a few times
# the rounding of the longest sum that occurs; a wrong mask, scale or head order is off by orders of magnitude more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
SAMPLE = 8


@dataclass(frozen=True, slots=True)
class Certificate:
    """How faithful one call is.

    Attributes:
        status: ``faithful``, ``unfaithful``, or ``unverified`` (verification was off).
        output_error: max abs error of weights·v against the kernel's own output.
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
class Later:
    """What a measurement needs that is put off: the rows that are checked, k and v whole, of one plain call."""

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor
    weights: Tensor | None
    mask: Tensor | None
    mask_key: int
    empty: bool
    scale: float

    def key(self) -> tuple[object, ...]:
        """Calls of one key are measured together."""
        return (
            self.q.shape,
            self.k.shape,
            self.v.shape,
            self.q.dtype,
            self.weights is None,
            self.mask_key,
            self.mask is None or self.mask.shape[:2] == (1, 1),
        )


@dataclass(slots=True)
class Pending:
    """Measured, but not yet read from the device: reading waits until the forward is over."""

    errors: Tensor | None  # output error, weights error, row-sum excess, max |v|
    unit: float
    rows: int
    of_rows: int
    formed: bool
    basis: str
    later_on: Later | None = None

    @classmethod
    def later(cls, what: Later, call: KernelCall, rows: slice) -> Pending:
        """A measurement that is put off."""
        t = call.q.shape[2]
        return cls(None, _unit(call), len(range(*rows.indices(t))), t, False, "output", what)

    @property
    def device(self) -> torch.device:
        """Where the measurement is, or will be made."""
        if self.later_on is not None:
            return self.later_on.q.device
        assert self.errors is not None
        return self.errors.device

    def settle(self, values: list[float]) -> Certificate:
        """The certificate, from the values of ``errors``."""
        output, weights, excess, size = values
        unit = self.unit
        tolerance = unit * max(size, 1e-3)
        good = output <= tolerance and weights <= unit and excess <= 4 * unit  # NaN fails
        return Certificate(
            "faithful" if good else "unfaithful",
            output,
            weights if self.formed else None,
            excess,
            tolerance,
            unit,
            self.rows,
            self.of_rows,
            self.basis,
        )


def rows_to_check(t: int, full: bool) -> slice:
    """All rows, or some that are spread evenly and include the last."""
    if full or t <= SAMPLE:
        return slice(0, t, 1)
    step = -(-t // SAMPLE)
    return slice((t - 1) % step, t, step)


def measure(call: KernelCall, rows: slice, mask: Tensor | None, derived: Tensor) -> Pending:
    """Compare what was rebuilt with what the kernel returned.

    Args:
        call: the call, restricted to what is captured.
        rows: the query rows that are checked.
        mask: the complete mask, broadcastable to B H T S.
        derived: B H rows S, weights derived from q, k, bias, mask and sinks.
    """
    t = call.q.shape[2]
    reference, basis = call.output, "output"
    if call.undropped is not None:
        reference, basis = call.undropped, "the kernel rerun without dropout"
    own = None if call.weights is None else call.weights[:, :, rows]
    used = derived if own is None else own if call.applied is None else call.applied[:, :, rows]
    wide = compute_dtype(call.q.dtype)
    live = None if mask is None else (mask[:, :, rows] if mask.shape[2] > 1 else mask).any(-1, keepdim=True)
    zero = derived.new_zeros(())
    if call.outer_error is not None:
        output_error, basis = call.outer_error.to(wide), "what the fused layer returned"
    elif reference is None:
        output_error, basis = zero, "nothing: the kernel's output was not seen"
    else:
        gap = weighted_values(used.to(wide), call.v) - reference[:, :, rows]
        output_error = _largest(gap, live)
    weights_error = zero if own is None else _largest(derived - own, live)
    total = (derived if own is None else own.to(wide)).sum(-1, keepdim=True) - 1
    if not derived.shape[-1]:
        total = total.new_zeros(())  # no keys: no row has anything to attend to
    excess = _largest(total if call.sinks is None else total.clamp_min(0), live)
    size = _largest(call.v.to(wide), None)
    errors = torch.stack([output_error, weights_error.to(wide), excess, size])
    return Pending(errors, _unit(call), len(range(*rows.indices(t))), t, own is not None, basis)


def measure_all(pending: list[Pending]) -> None:
    """Make the measurements that were put off, all calls of one shape at once."""
    groups: dict[tuple[object, ...], list[Pending]] = {}
    for one in pending:
        if one.later_on is not None:
            groups.setdefault(one.later_on.key(), []).append(one)
    for several in groups.values():
        whats = [p.later_on for p in several if p.later_on is not None]
        n, first = len(whats), whats[0]
        shared = first.mask is None or first.mask.shape[:2] == (1, 1)
        for start in range(0, n, n if shared else 1):
            part = slice(start, n if shared else start + 1)
            for p, errors in zip(several[part], _measure_group(whats[part]), strict=True):
                p.errors, p.later_on = errors, None


def _measure_group(whats: list[Later]) -> Tensor:
    """N plain calls of one shape and mask -> N 4, as :class:`Pending` has them."""
    first, n = whats[0], len(whats)
    wide = compute_dtype(first.q.dtype)
    v = torch.cat([w.v for w in whats]).to(wide)
    live = first.mask.any(-1, keepdim=True) if first.mask is not None and first.empty else None
    if first.weights is None:
        scales = [w.scale for w in whats]
        q = torch.cat([w.q for w in whats])
        scores = dot_scores(q, torch.cat([w.k for w in whats]), scales[0])
        if any(s != scales[0] for s in scales):
            factors = scores.new_tensor([s / scales[0] for s in scales])
            scores.mul_(factors.repeat_interleave(first.q.shape[0]).view(-1, 1, 1, 1))
        weights = softmax_weights(scores, first.mask, empty=first.empty)
    else:
        weights = torch.cat([w.weights for w in whats if w.weights is not None]).to(wide)
    gap = weighted_values(weights, v) - torch.cat([w.output for w in whats])
    excess = weights.sum(-1, keepdim=True) - 1
    if live is not None:
        gap, excess = torch.where(live, gap, 0.0), torch.where(live, excess, 0.0)
    largest = [x.reshape(n, -1).abs().amax(1) for x in (gap, excess, v)]
    return torch.stack([largest[0], torch.zeros_like(largest[0]), largest[1], largest[2]], 1)


def _unit(call: KernelCall) -> float:
    """The allowed distance per unit, by the narrowest dtype that was computed in."""
    dtypes = (call.q.dtype, call.softmax_dtype or call.q.dtype)
    return max(TOLERANCE.get(d, TOLERANCE[torch.float16]) for d in dtypes)


def _largest(x: Tensor, live: Tensor | None) -> Tensor:
    """Max abs over rows that have something to attend to."""
    if live is not None:
        x = torch.where(live, x, 0.0)
    return torch.linalg.vector_norm(x, ord=torch.inf) if x.numel() else x.new_zeros(())
