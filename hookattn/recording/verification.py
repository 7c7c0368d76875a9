"""How a certificate is measured: some rows of a call are rebuilt and held against what the model's kernel returned.

Reading from a device waits for all that is queued there. So what was measured stays a tensor (:class:`Measurement`)
until somebody asks; :func:`read_certificates` reads many at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..attention.functional import compute_dtype, dot_scores, finish_scores, weighted_values
from ..attention.kernel_call import KernelCall
from ..attention.masks import CompleteMask
from ..attention.normalizers import is_softmax, normalized, normalizer_of
from ..calls.certificate import Certificate, tolerance
from ..calls.edits import AppliedEdit, Chosen, edited_entries
from ..calls.mask_rule import MaskRule
from ..torch_internals import devices
from .selection import restrict

# How many query rows a sample has at most. A wrong mask, scale or head order is wrong in nearly every row, so that a
# few of them find it.
SAMPLE = 8

# Up to this many scores, leaving rows out would cost more than it saves.
ALL = 1 << 14

# No head is held to more than this of a unit, however small its values.
_LEAST = 1e-3

X = TypeVar("X")


class Edited(NamedTuple):
    """What of a call was set by edits: each bool, broadcastable to B H T 1, True = set; None: nothing was.

    Attributes:
        weights: the rows whose weights are not what the scores make.
        output: the rows whose output is not what the weights make of the values.
    """

    weights: Tensor | None = None
    output: Tensor | None = None

    @classmethod
    def of(cls, edits: Sequence[AppliedEdit], call: KernelCall, heads: Chosen = None, queries: Chosen = None) -> Edited:
        """What edits have set in a call; ``heads`` and ``queries``: which of the model's it has, None: all."""
        if not edits:
            return UNEDITED
        (b, h, t, s), device = call.shape, call.device
        found = {}
        for field, axes in (("weights", ("scores", "weights")), ("output", ("output",))):
            several = [edited_entries(edits, x, (b, h, t, s), device, heads, queries) for x in axes]
            rows = [x.any(-1, keepdim=True) for x in several if x is not None]
            found[field] = None if not rows else rows[0] if len(rows) == 1 else rows[0] | rows[1]
        return cls(**found)

    def of_rows(self, rows: slice) -> Edited:
        """Of some query rows."""
        return Edited(*(x if x is None or x.shape[2] == 1 else x[:, :, rows] for x in self))

    def but(self, live: Tensor | None, name: str) -> Tensor | None:
        """The rows that count: those that attend to something, without those that were set."""
        x: Tensor | None = getattr(self, name)
        return live if x is None else ~x if live is None else live & ~x


UNEDITED = Edited()


class Maxima(NamedTuple, Generic[X]):
    """The largest absolute values that a certificate is made of: tensors of N calls, or the numbers of one.

    Attributes:
        row_sums: N 1, how far a row of weights is from summing to 1 (with sinks: above 1).
        weights: N 1, the derived weights against the model's own; None where it forms none.
        scores: N 1, the scores that the weights were derived from; None where nothing is allowed for them.
        outputs: N O, the rebuilt output against the kernel's own, for each batch entry and head, or for all of them.
        values: N P, ``v`` of each batch entry and key head, which the errors of the output are held against; where
            weights do not sum to 1, times the largest sum of their sizes.
        sizes: N 1, the largest weight, which their errors are held against; None: it is at most 1.
    """

    row_sums: X
    weights: X | None
    scores: X | None
    outputs: X
    values: X
    sizes: X | None = None


@dataclass(slots=True)
class Measurement:
    """N calls of one shape, measured and not yet read from the device.

    Attributes:
        packed: N C, the columns of the :class:`Maxima` side by side: one tensor, as each that is read takes a transfer.
        widths: how many of the C columns each of the maxima has; None: there is none of it.
        unit: the allowed distance per unit, from :data:`~hookattn.calls.certificate.TOLERANCE`.
        rows: query rows checked, of ``of_rows``.
        basis: what the rebuilt output was compared with.
        rounding: what is allowed beside ``unit``, in units of the largest score: rounding it moves every weight.
    """

    packed: Tensor
    widths: list[int | None]
    unit: float
    rows: int
    of_rows: int
    basis: str = "output"
    rounding: float = 0.0

    @classmethod
    def of(
        cls,
        maxima: Maxima[Tensor],
        unit: float,
        rows: int,
        of_rows: int,
        basis: str = "output",
        rounding: float = 0.0,
    ) -> Measurement:
        """From the maxima of N calls; the rest as the attributes."""
        packed = torch.cat([x for x in maxima if x is not None], 1)
        return cls(packed, [None if x is None else x.shape[1] for x in maxima], unit, rows, of_rows, basis, rounding)

    def certificates(self, numbers: list[float]) -> list[Certificate]:
        """The certificates of the N calls, from the numbers of ``packed`` in their order."""
        made = []
        start = 0
        while start < len(numbers):
            columns: list[list[float] | None] = []
            for width in self.widths:
                columns.append(None if width is None else numbers[start : start + width])
                start += width or 0
            made.append(self._certificate(Maxima(*columns)))  # type: ignore[arg-type]
        return made

    def _certificate(self, maxima: Maxima[list[float]]) -> Certificate:
        """One certificate, with the allowance for large scores only where it is needed: the bound is as tight as can
        be."""
        made = self._certify(self.unit, maxima)
        if maxima.scores is not None and not made.faithful and math.isfinite(maxima.scores[0]):
            return self._certify(self.unit + self.rounding * maxima.scores[0], maxima)
        return made

    def _certify(self, unit: float, maxima: Maxima[list[float]]) -> Certificate:
        """One certificate; its output error is that of the head that is worst off for the size of its values."""
        excess, errors = maxima.row_sums[0], maxima.outputs
        weights = None if maxima.weights is None else maxima.weights[0]
        of_weights = unit if maxima.sizes is None else unit * max(1.0, maxima.sizes[0])
        bounds = [unit * max(size, _LEAST) for size in maxima.values] or [unit * _LEAST]
        if len(errors) < len(bounds):
            bounds = [max(bounds)]
        per = max(len(errors) // len(bounds), 1)  # query heads of one key head
        worst, output, bound_of_worst = -1.0, 0.0, max(bounds)
        for i, error in enumerate(errors):
            bound = bounds[i // per]
            # Written so that NaN, which compares with nothing, is worse than anything and never good enough.
            if not error / bound <= worst:
                worst, output, bound_of_worst = error / bound, error, bound
                if math.isnan(error):
                    break
        good = output <= bound_of_worst and (weights is None or weights <= of_weights) and excess <= 4 * unit
        return Certificate(
            "faithful" if good else "unfaithful",
            output,
            weights,
            excess,
            bound_of_worst,
            of_weights,
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


def measure(call: KernelCall, mask: MaskRule, full: bool, edited: Edited = UNEDITED) -> Measurement:
    """Rebuild some rows of a call, and hold them against what the model's kernel returned.

    Args:
        call: the call, restricted to what is captured; heads are grouped evenly. Its own ``mask`` is not looked at.
        mask: its complete mask.
        full: whether all rows are checked.
        edited: what of it was set by edits, and follows from nothing.
    """
    b, h, t, s = call.shape
    rows = rows_to_check(t, full, b * h * t * s)
    if call.scores is call.weights is None and devices.on_gpu(call.v) and is_softmax(call.normalizer):
        from ..attention.kernels import check  # what it needs is heavy

        ruled = mask.given is None and mask.diagonal.hides_any
        real = None if ruled else mask.complete().real
        if (found := check(call, rows, real, mask.diagonal if ruled else None, mask.rows)) is not None:
            return measurement_of_maxima(call, rows, found)
    if rows == slice(0, t, 1):
        return _measurement(call, mask.complete(), t, edited)
    every, part = slice(None), replace(call, mask=None)
    restrict(part, None, rows)
    return _measurement(part, mask.of(every, every, rows).complete(), t, edited.of_rows(rows))


def _measurement(call: KernelCall, mask: CompleteMask, of_rows: int, edited: Edited) -> Measurement:
    """The same of the rows that a call has, all of which are checked.

    Args:
        call: the rows of a call that are checked.
        mask: their complete mask.
        of_rows: how many rows the whole call has.
        edited: of these rows.
    """
    own, wide, (b, _, t, s) = call.weights, compute_dtype(call.dtype), call.shape
    scores = _scores(call)
    derived = None if scores is None else normalized(call.normalizer, scores, mask.real, call.sinks, mask.empty)
    live = mask.real.any(-1, keepdim=True) if mask.empty and mask.real is not None else None
    weights = derived if own is None else own.to(wide)
    assert weights is not None, "weights that nobody can derive are the model's own"
    used = weights if call.applied is None else call.applied.to(wide)
    ours = edited.but(live, "weights")  # the rows whose weights follow from their scores
    outputs, basis = _output_errors(call, used, edited.but(live, "output"))
    if derived is None:
        basis = f"{basis} of the model's own weights"
    v = call.v if call.v.shape[0] == b else call.v.expand(b, -1, -1, -1)
    finite = torch.nan_to_num(v.to(wide), 0.0, 0.0, 0.0)  # the value of a key that nobody attends to may be anything
    values, sizes = max_abs(finite, None, 2), None
    # Without keys no row has anything to attend to.
    total = weights.sum(-1, keepdim=True) - 1 if s else weights.new_zeros((1,) * 4)
    if not normalizer_of(call.normalizer).sums_to_one:
        total = torch.zeros_like(total)
        sizes = max_abs(weights, live)
        sums = max_abs(used.abs().sum(-1), None if live is None else live[..., 0])
        values = values * sums.nan_to_num(1.0, 1.0).clamp_min(1)  # what is not finite is no bound for anything
    largest = None
    if scores is not None:
        largest = max_abs(scores if mask.real is None else torch.where(mask.real, scores, 0.0), None).to(wide)
    maxima = Maxima(
        row_sums=max_abs(total if call.sinks is None else total.clamp_min(0), ours),
        weights=None if own is None or derived is None else max_abs(derived - own, ours).to(wide),
        scores=largest,
        outputs=outputs.to(wide),
        values=values,
        sizes=sizes,
    )
    rounding = score_rounding(call.dtype, own is not None)
    return Measurement.of(maxima, tolerance_of(call), t, of_rows, basis, rounding)


def _scores(call: KernelCall) -> Tensor | None:
    """B H T S: what the weights are made of; None: the model formed none, and they do not follow from q and k."""
    if call.is_product:  # scores that the model formed prove nothing about q and k: these are multiplied again
        return finish_scores(dot_scores(call.q, call.k, call.scale), call.softcap, call.bias)
    return None if call.scores is None else call.scores.to(compute_dtype(call.scores.dtype))


def _output_errors(call: KernelCall, used: Tensor, live: Tensor | None) -> tuple[Tensor, str]:
    """How far ``used · v`` is from what the kernel returned, 1 B·H, or 1 1 of all heads; and what that was."""
    if call.outer_error is not None:
        return call.outer_error.reshape(1, 1), "what the fused layer returned"
    reference, basis = call.output, "output"
    if call.undropped is not None:
        reference, basis = call.undropped, "the kernel rerun without dropout"
    if reference is None:
        return used.new_zeros(1, 1), "nothing: the kernel's output was not seen"
    return max_abs(weighted_values(used, call.v) - reference, live, 2), basis


def measurement_of_maxima(call: KernelCall, rows: slice, found: Tensor) -> Measurement:
    """The same from what a GPU's kernel found, of a call that forms neither scores nor weights of its own.

    Args:
        call, rows: as in :func:`measurement`.
        found: 4, B·H: excess of row sums, largest score, largest error and largest value of each batch entry and head.
    """
    (b, h, t), g = call.q.shape[:3], call.k.shape[1]
    values = found[3] if g == h else found[3].view(b * g, h // g).amax(1)
    excess_and_score = found[:2].amax(1, keepdim=True)
    maxima = Maxima(excess_and_score[:1], None, excess_and_score[1:], found[2:3], values.view(1, -1))
    return Measurement.of(
        maxima, tolerance_of(call), len(range(*rows.indices(t))), t, rounding=score_rounding(call.dtype, False)
    )


def read_certificates(measured: Sequence[Measurement]) -> list[list[Certificate]]:
    """The certificates of what was measured, a list for each measurement; one transfer for each device."""
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, one in enumerate(measured):
        places.setdefault((one.packed.device, one.packed.dtype), []).append(i)
    made: dict[int, list[Certificate]] = {}
    for several in places.values():
        parts = [measured[i].packed.view(-1) for i in several]
        flat: list[float] = (parts[0] if len(parts) == 1 else torch.cat(parts)).tolist()
        start = 0
        for i, part in zip(several, parts, strict=True):
            end = start + part.numel()
            made[i] = measured[i].certificates(flat[start:end])
            start = end
    return [made[i] for i in range(len(measured))]


def tolerance_of(call: KernelCall) -> float:
    """The allowed distance per unit, by the narrowest dtype that was computed in."""
    dtypes = {call.dtype, call.v.dtype, call.softmax_dtype or call.dtype}
    if call.weights is not None:
        dtypes.add(call.weights.dtype)
    return max(map(tolerance, dtypes))


def score_rounding(dtype: torch.dtype, formed: bool) -> float:
    """How far the rounding of a score of 1 may move a weight.

    Args:
        dtype: the kernel's.
        formed: whether the model formed weights of its own, in this dtype; a fused kernel has float32 at least.
    """
    return 2 * torch.finfo(dtype if formed else compute_dtype(dtype)).eps


def max_abs(x: Tensor, live: Tensor | None, keep: int = 0) -> Tensor:
    """The largest absolute value over all dimensions but the first ``keep``, which are flattened: 1 n.

    Args:
        live: broadcastable to ``x``, False where a row has nothing to attend to and counts as 0; None: all count.
    """
    if live is not None:
        x = torch.where(live, x, 0.0)
    if not x.numel():
        return x.new_zeros(1, x.shape[:keep].numel())
    most = x.abs().flatten(keep).amax(keep) if keep else x.abs().amax()
    return most.reshape(1, -1)


def kept_row_indices(call: KernelCall, queries: Sequence[int] | slice | None) -> Tensor:
    """T: which rows of a whole call a selection keeps."""
    rows = torch.arange(call.shape[2], device=call.device)
    return rows if queries is None else rows[queries] if isinstance(queries, slice) else rows[list(queries)]
