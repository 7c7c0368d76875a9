"""What a head moves, and not only where it looks: weights times the size of what they are weights of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from einops import einsum
from torch import Tensor

from ...attention.functional import compute_dtype
from ...calls.certificate import UNVERIFIED
from ...errors import MeasureError
from ...traces import Trace
from ..call_view import View
from ..circuits.circuit import Circuit, circuit_of, triangular_factor
from .base import Measure

_WEIGHED = "weights are those of the model times the size of what they are weights of"


@dataclass(frozen=True)
class ValueNorm(Measure):
    """``Σ_j w_ij ‖v_j‖``, the mean over the queries: how large the values are that a head reads, where it looks.

    The size of its output is at most this, and less where values cancel.
    """

    name: ClassVar[str] = "value_norm"
    unit: ClassVar[str] = "norm of v"
    reads: ClassVar[tuple[str, ...]] = ("weights", "mask", "v")

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
    circuits: Sequence[Circuit] = field(repr=False, hash=False)

    def rows(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        return _weighted_sum(view.weights, output_norms(view, self.circuits))


def value_weighted(trace: Trace, *, normalise: bool = True) -> Trace:
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
    return _reweighted(trace, value_norms, normalise)


def norm_based(trace: Trace, circuits: Sequence[Circuit], *, normalise: bool = True) -> Trace:
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
    return _reweighted(trace, lambda view: output_norms(view, circuits), normalise)


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
    """B H T: ``Σ_j w_ij size_j``."""
    total: Tensor = einsum(weights, sizes, "b h t s, b h s -> b h t")
    return total


def _row_norms(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm


def _wide_values(view: View) -> Tensor:
    """B H S E, ``v`` in a dtype whose squares do not overflow."""
    v = view.per_head("v")
    return v.to(compute_dtype(v.dtype))


def _reweighted(trace: Trace, size: Callable[[View], Tensor], normalise: bool) -> Trace:
    calls = []
    for call in trace.calls:
        view = View(call, trace)
        weights = view.weights * size(view).unsqueeze(-2)
        if normalise:
            total = weights.sum(-1, keepdim=True)
            weights = weights / total.masked_fill(total == 0, 1.0)
        fields: dict[str, Any] = {"weights": weights, "sinks": None, "bias": None}
        if call.has("mask"):
            fields["mask"] = call.mask
        notes = (*call.notes, _WEIGHED + (", each row divided by its sum" if normalise else ""))
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
