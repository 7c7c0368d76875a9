"""What a head moves, and not only where it looks: weights times the size of what they are weights of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from einops import einsum
from torch import Tensor

from ... import checks
from ...attention.functional import compute_dtype
from ...calls.certificate import UNVERIFIED
from ...errors import MeasureError
from ...traces import Trace, TraceLike, as_trace
from ..call_view import View
from ..circuits.circuit import Circuit, checked_circuits, circuit_of, triangular_factor
from ..frame import views
from .base import Measure

_WEIGHED = "weights are those of the model times the size of what they are weights of"
_FIELDS = {"weights": "", "applied": " as they met the values"}


@dataclass(frozen=True)
class ValueNorm(Measure):
    """``Σ_j |w_ij| ‖v_j‖``, the mean over the queries: how large the values are that a head reads, where it looks.

    The size of its output is at most this, and less where values cancel.
    """

    name: ClassVar[str] = "value_norm"
    unit: ClassVar[str] = "norm of v"
    reads: ClassVar[tuple[str, ...]] = ("weights", "mask", "v")
    distribution: ClassVar[bool] = False

    def rows(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        return _weighted_sum(view.weights, value_norms(view))


@dataclass(frozen=True)
class OutputNorm(Measure):
    """``Σ_j ‖w_ij f(x_j)‖`` with ``f(x_j) = (x_j W_V + b_V) W_O = v_j W_O`` of the head, the mean over the queries.

    The size of what a head writes into the residual stream, vector by vector (Kobayashi et al. 2020).

    Attributes:
        circuits: of the traced model, as :func:`hookattn.analyze.circuit` makes them.
    """

    name: ClassVar[str] = "output_norm"
    unit: ClassVar[str] = "norm of the residual stream"
    reads: ClassVar[tuple[str, ...]] = ("weights", "mask", "v")
    distribution: ClassVar[bool] = False
    circuits: Sequence[Circuit] = field(repr=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "circuits", checked_circuits(self.circuits, "OutputNorm: circuits"))

    def rows(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        return _weighted_sum(view.weights, output_norms(view, self.circuits))


def value_weighted(trace: TraceLike, *, normalise: bool = True) -> Trace:
    """The trace with ``w_ij ‖v_j‖`` for weights, for whatever takes a trace: measures, tables, renderers.

    Args:
        trace: with weights (or what they are derived of) and ``v``.
        normalise: whether each row is divided by its sum, so that it is a distribution again, as measures take it
            for; a row that is 0 stays so. What went to sinks moves nothing and is left out.

    Returns:
        A Trace whose calls hold ``weights`` (float32, float64 for a call in that) and ``mask``, and nothing else.

    Raises:
        FieldNotCaptured: weights or ``v`` were not kept.
    """
    checks.flag("normalise", normalise)
    return _reweighted(trace, lambda view: _times(view, value_norms(view)), normalise, _WEIGHED)


def norm_based(trace: TraceLike, circuits: Sequence[Circuit], *, normalise: bool = True) -> Trace:
    """The trace with ``‖w_ij f(x_j)‖`` for weights: norm-based attention (Kobayashi et al. 2020).

    Args:
        trace: with weights (or what they are derived of) and ``v``.
        circuits: of the traced model, as :func:`hookattn.analyze.circuit` makes them.
        normalise: as for :func:`value_weighted`; they compare it unnormalised.

    Returns:
        As :func:`value_weighted`.

    Raises:
        MeasureError: a call has no circuit, or its W_O is not known.
        FieldNotCaptured: weights or ``v`` were not kept.
    """
    checks.flag("normalise", normalise)
    found = checked_circuits(circuits)
    return _reweighted(trace, lambda view: _times(view, output_norms(view, found)), normalise, _WEIGHED)


def as_distribution(trace: TraceLike, field: str = "weights") -> Trace:
    """The trace with ``|w_ij| / Σ_j |w_ij|`` for weights: what the attention of a normalizer that is no softmax (a
    sigmoid, a ReLU, a difference of two softmaxes) is measured by, as measures take weights for shares.

    Args:
        trace: with weights (or what they are derived of).
        field: ``weights``, or ``applied``: what met the values, where a call has that apart from its weights.

    Returns:
        As :func:`value_weighted`. A row that is 0 stays so, and what went to sinks is left out.

    Raises:
        SelectionError: an unknown ``field``.
        FieldNotCaptured: it was not kept.
    """
    checks.word("field", field, ("weights", "applied"))

    def weights(view: View) -> Tensor:
        applied = view.call.get("applied") if field == "applied" else None
        return (view.weights if applied is None else applied.to(compute_dtype(applied.dtype))).abs()

    return _reweighted(trace, weights, True, f"weights are the magnitudes of the model's own{_FIELDS[field]}")


def value_norms(view: View) -> Tensor:
    """B H S: ``‖v_j‖``.

    Raises:
        FieldNotCaptured: ``v`` was not kept.
    """
    return _row_norms(_wide_values(view))


def output_norms(view: View, circuits: Sequence[Circuit]) -> Tensor:
    """B H S: ``‖v_j W_O‖`` of each head, by a matrix no larger than E E.

    Raises:
        MeasureError: there is no circuit, its W_O is not known, or it is for values of another width.
        FieldNotCaptured: ``v`` was not kept.
    """
    v, found = _wide_values(view), circuit_of(view, circuits)
    weight = found.W_O[list(view.heads)].to(v.device)
    if weight.shape[1] != v.shape[3]:
        raise MeasureError(f"{view.where} has values of width {v.shape[3]}, and its circuit of {weight.shape[1]}.")
    small = triangular_factor(weight.transpose(1, 2)).to(v.dtype)
    return _row_norms(einsum(v, small, "b h s e, h r e -> b h s r"))


def _weighted_sum(weights: Tensor, sizes: Tensor) -> Tensor:
    """B H T: ``Σ_j |w_ij| size_j``; but for a few normalizers no weight is negative."""
    total: Tensor = einsum(weights.abs(), sizes, "b h t s, b h s -> b h t")
    return total


def _row_norms(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm


def _wide_values(view: View) -> Tensor:
    """B H S E, ``v`` in a dtype whose squares do not overflow."""
    v = view.per_head("v")
    return v.to(compute_dtype(v.dtype))


def _times(view: View, sizes: Tensor) -> Tensor:
    """B H T S: the magnitude of each weight times the size, B H S, of what it is the weight of."""
    return view.weights.abs() * sizes.unsqueeze(-2)


def _reweighted(given: TraceLike, made_of: Callable[[View], Tensor], normalise: bool, said: str) -> Trace:
    trace = as_trace(given)
    calls = []
    for view in views(trace):
        call = view.traced
        weights = made_of(view)
        if normalise:
            total = weights.sum(-1, keepdim=True)
            weights = weights / total.masked_fill(total == 0, 1.0)
        fields: dict[str, Any] = {"weights": weights, "sinks": None, "bias": None}
        if call.has("mask"):
            fields["mask"] = call.mask
        notes = (*call.notes, said + (", each row divided by its sum" if normalise else ""))
        calls.append(
            replace(
                call,
                dtype=weights.dtype,
                certificate=UNVERIFIED,
                derivable=(),
                fields=fields,
                beside={},
                notes=notes,
            )
        )
    return replace(trace, calls=calls, path=None)
