"""Several heads, or several layers, as one matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ... import checks
from ...errors import MeasureError
from ..call_view import View, blocks_of
from ..frame import views

if TYPE_CHECKING:
    from ...traces import TraceLike


class _Reduction(NamedTuple):
    """How several matrices become one, a few of them at a time.

    Attributes:
        reduce: … over one axis, which goes.
        combine: of what was reduced of some, and of some more.
        share: whether the result is divided by how many there were.
    """

    reduce: Callable[[Tensor, int], Tensor]
    combine: Callable[[Tensor, Tensor], Tensor]
    share: bool = False


HOW: dict[str, _Reduction] = {
    "mean": _Reduction(torch.sum, torch.add, share=True),
    "max": _Reduction(torch.amax, torch.maximum),
    "min": _Reduction(torch.amin, torch.minimum),
    "norm": _Reduction(lambda x, axis: torch.linalg.vector_norm(x, dim=axis), torch.hypot),
}
"""What ``how=`` may be; ``norm`` is the Euclidean one. Rows sum to 1 for ``mean`` alone."""


def aggregate(trace: TraceLike, how: str = "mean") -> list[Tensor]:
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
    how_to = _reduction(how)
    return [_over_heads(view, how_to) for view in views(trace)]


def _over_heads(view: View, how: _Reduction) -> Tensor:
    """B T S."""
    made = functools.reduce(how.combine, (how.reduce(part.weights, 1) for part in view.parts()))
    return made / view.shape[1] if how.share else made


def aggregate_layers(trace: TraceLike, how: str = "mean") -> Tensor:
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
    how_to, several = _reduction(how), list(views(trace))
    check_alike(several, "layers can be aggregated")
    first = several[0]
    for view in several:
        if tuple(view.heads) != tuple(first.heads):
            raise MeasureError(
                f"layers can be aggregated where they have the same heads: {first.where} has heads "
                f"{list(first.heads)}, {view.where} has {list(view.heads)}. Trace again with the same heads= for all."
            )
    # Block by block of heads, and in each layer by layer: no more than two of them are there beside the result.
    made = [_over_layers(several, heads, how_to) for heads in blocks_of(several)]
    return torch.cat(made, 1)


def _over_layers(several: Sequence[View], heads: Sequence[int], how: _Reduction) -> Tensor:
    """B h T S of some heads."""
    weights = (view.part(heads).weights.unsqueeze(0) for view in several)
    made = functools.reduce(how.combine, (how.reduce(x, 0) for x in weights))
    return made / len(several) if how.share else made


def _reduction(how: str, name: str = "how") -> _Reduction:
    return HOW[checks.word(name, how, HOW)]


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
