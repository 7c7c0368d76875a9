"""Attention through the layers: which input tokens a token of a later layer is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import checks
from ...errors import MeasureError, SelectionError
from ...traces import as_trace
from ..call_view import View
from ..frame import views
from .aggregate import HOW, aggregate, check_alike

if TYPE_CHECKING:
    from ...traces import TraceLike


def rollout(
    trace: TraceLike, *, heads: str = "mean", residual: float = 0.5, start_layer: int = 0, real: Any = None
) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020): ``R_l = A_l R_{l−1}``, ``A = (1 − residual)·W + residual·I``.

    W is a layer's weights over its heads, each row over its sum, so that rows of the result sum to 1. What sinks take
    goes nowhere: W is what is left, over its sum. A row that is padding, or has nothing to attend to, stays itself.

    Args:
        trace: self-attention layers of one stack and one forward, in the order they ran, with weights. A layer that is
            not in the trace, and whatever else moves something between tokens, is left out. Windows that were folded
            into the batch are each a sequence of its own here.
        heads: ``mean``, ``max``, ``min`` or ``norm``, see :func:`hookattn.analyze.aggregate`.
        residual: the share of a token that comes past the attention; 0.5 in the paper.
        start_layer: which call to start at; those before it are left out. Negative: from the end.
        real: bool or 0/1, B S: True = a real token, no padding.

    Returns:
        L B T S: for each layer from ``start_layer`` on, what its token i has of the first one's input token j. The last
        one, ``[-1]``, is what is meant by the rollout of a model.

    Raises:
        MeasureError: calls that are no such layers (cross-attention, another size, a cache, several steps or stacks,
            query rows left out); says which and why.
        SelectionError: ``heads``, ``residual`` or ``start_layer`` is none there is.
        FieldNotCaptured: the weights were not kept.
    """
    steps = mixing_matrices(trace, heads, residual, start_layer, real)
    rolled = [steps[0]]
    for step in steps[1:]:
        rolled.append(step @ rolled[-1])
    return torch.stack(rolled)


def mixing_matrices(trace: TraceLike, heads: str, residual: float, start_layer: int, real: Any) -> Tensor:
    """L B T S: the matrices A of :func:`rollout`, whose arguments these are.

    Raises:
        MeasureError, SelectionError, FieldNotCaptured: see :func:`rollout`.
    """
    checks.word("heads", heads, HOW)
    residual = checks.number("residual", residual, "a share from 0, below 1", lambda x: 0 <= x < 1)
    start_layer = checks.whole("start_layer", start_layer)
    trace = as_trace(trace)
    several = list(views(trace, real))
    if not -len(several) <= start_layer < len(several):
        raise SelectionError(f"start_layer={start_layer}: the trace has {len(several)} calls.")
    several = several[start_layer:]
    for view in several:
        _check_self_attention(view, several[0])
    check_alike(several, "layers follow on each other", "BTS")
    merged = aggregate(trace[start_layer:], heads)
    for view, w in zip(several, merged, strict=True):
        if bool((w < 0).any()):
            raise MeasureError(
                f"rollout and flow divide what is shared out, and {view.where} has negative weights: "
                f"{view.no_distribution}."
            )
    return torch.stack([_mixing_matrix(view, w, residual) for view, w in zip(several, merged, strict=True)])


def _mixing_matrix(view: View, weights: Tensor, residual: float) -> Tensor:
    """B T S."""
    eye = torch.eye(view.shape[2], dtype=weights.dtype, device=weights.device)
    total = weights.sum(-1, keepdim=True)
    # A row without attention passes on what it has: all of it comes past the layer.
    still = (total == 0) | ~view.rows.unsqueeze(-1)
    return torch.where(still, eye, (1 - residual) * weights / total + residual * eye)


def _check_self_attention(view: View, first: View) -> None:
    _, _, t, s = view.shape
    call, other = view.call, first.call
    why = None
    if view.crosses:
        why = "it is cross-attention; take trace.select(kind='self')"
    elif call.queries is not None:
        why = "query rows were left out; trace again without queries="
    elif t != s:
        why = f"it has {t} queries and {s} keys; of a generation take trace.select(step=0), or trace.stitch()"
    elif call.step != other.step:
        why = f"it is in another forward than {first.where}; take trace.select(step=…), or trace.stitch()"
    elif call.site.stack != other.site.stack:
        stacks = f"{call.site.stack} and {first.where} in {other.site.stack}"
        why = f"it is in the stack {stacks}; take trace.select(stack=…)"
    if why is not None:
        raise MeasureError(f"rollout and flow go through layers of self-attention; {view.where} is none: {why}.")
