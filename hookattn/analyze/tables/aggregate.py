"""Several heads, or several layers, as one matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from einops import reduce
from torch import Tensor

from ...errors import MeasureError, SelectionError
from ..call_view import View
from ..frame import views

if TYPE_CHECKING:
    from ...traces import Trace

Reduction = str | Callable[[Tensor, tuple[int, ...]], Tensor]

HOW: dict[str, Reduction] = {
    "mean": "mean",
    "max": "max",
    "min": "min",
    "norm": lambda x, axes: torch.linalg.vector_norm(x, dim=axes),
}
"""What ``how=`` may be; ``norm`` is the Euclidean one. Rows sum to 1 for ``mean`` alone."""


def aggregate(trace: Trace, how: str = "mean") -> list[Tensor]:
    """The weights of each call over its heads.

    Args:
        trace: with weights.
        how: ``mean``, ``max``, ``min`` or ``norm`` (``√Σ_h w_h²``).

    Returns:
        B T S for each call, float32 (float64 for a call in that). Padding is left as it is.

    Raises:
        SelectionError: an unknown ``how``.
        FieldNotCaptured: the weights were not kept.
        MeasureError: the trace has no calls.
    """
    reduction = _reduction(how)
    return [reduce(view.weights, "b h t s -> b t s", reduction) for view in views(trace)]


def aggregate_layers(trace: Trace, how: str = "mean") -> Tensor:
    """The weights of each head over all calls: head h of one with head h of the others.

    Args:
        trace: with weights; all calls of one shape.
        how: as in :func:`aggregate`; over both, aggregate the result over its heads, ``.mean(1)``.

    Returns:
        B H T S.

    Raises:
        MeasureError: no calls, or calls that differ in shape or in the heads that were kept.
        SelectionError, FieldNotCaptured: see :func:`aggregate`.
    """
    reduction, several = _reduction(how), list(views(trace))
    check_alike(several, "layers can be aggregated")
    first = several[0]
    for view in several:
        if tuple(view.heads) != tuple(first.heads):
            raise MeasureError(
                f"layers can be aggregated where they have the same heads: {first.where} has heads "
                f"{list(first.heads)}, {view.where} has {list(view.heads)}. Trace again with the same heads= for all."
            )
    layers: Tensor = reduce([view.weights for view in several], "layer b h t s -> b h t s", reduction)
    return layers


def _reduction(how: str) -> Reduction:
    if how not in HOW:
        raise SelectionError(f"how={how!r}: expected one of {', '.join(HOW)}.")
    return HOW[how]


def check_alike(several: Sequence[View], what: str, axes: str = "BHTS") -> None:
    """Raise a MeasureError unless all calls have the same extents.

    Args:
        several: the calls.
        what: what this is needed for, as in "layers can be aggregated".
        axes: which extents.
    """
    at = ["BHTS".index(axis) for axis in axes]
    first = several[0]
    for view in several:
        if [view.shape[i] for i in at] != [first.shape[i] for i in at]:
            sizes = [" ".join(f"{axes[n]}{v.shape[i]}" for n, i in enumerate(at)) for v in (first, view)]
            raise MeasureError(
                f"{what} where they are of one size: {first.where} has {sizes[0]}, {view.where} has {sizes[1]}. "
                "Take calls that fit with trace.select(…)."
            )
