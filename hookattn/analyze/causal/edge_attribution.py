"""What knocking out each edge of each head would do to a metric, of one backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import checks
from .backward import BackwardRun
from .edge_table import BY, checked_top, edge_table
from .head_table import Column, head_table
from .metric import Metric
from .nodes import Patched, check_deterministic

if TYPE_CHECKING:
    from pandas import DataFrame


def edge_attribution(model: nn.Module, inputs: Any, metric: Metric, *, by: str = "edge", top: int = 100) -> DataFrame:
    """The effect of knocking out each edge i→j of each head: ``Σ_s (W∖j − W)_is · g_is``, with ``g = ∂m/∂W`` at the
    model's own run, and W∖j the weights as they are when key j is hidden from query i.

    The row that renormalises is computed exactly, and what follows is linear in it, as in AtP* (Kramár et al. 2024):
    ``−w_j (g_j − ḡ)/(1 − w_j)`` with ``ḡ = Σ_s w_s g_s``; where a query is left nothing to attend to, ``−w_j g_j``.
    ``edit.knockout(queries=[i], keys=[j])`` does it. The first-order effect without renormalising, that of a weight set
    to 0, is ``−weight·gradient``. One forward and one backward do for all edges; T S numbers are held of each head.

    Args:
        model: any module whose attention can be edited, see :func:`hookattn.editing`; in eval mode.
        inputs: as :func:`hookattn.trace` takes them.
        metric: a function of the model's output that returns a scalar tensor.
        by: ``"edge"``: a row for each of the edges with the largest effects; ``"head"``: for each head.
        top: how many edges.

    Returns:
        A pandas DataFrame. By edge ``call``, ``step``, ``layer``, ``stack``, ``kind``, ``path``, ``head``, ``example``,
        ``query``, ``token``, ``key``, ``target``, ``knockout`` (the effect, in units of the metric), ``weight`` and
        ``gradient``, the largest magnitude first. By head, as of :func:`hookattn.analyze.report`: ``edges``, the sum of
        the magnitudes, and ``largest_edge``, the largest. ``attrs["metric"]`` is the metric.

    Raises:
        InputError: the metric returned no scalar. SelectionError: no such ``by``, or ``top``.
        GradientError: the metric has no gradient, or no attention leads to it.
        EditError: the output of an attention call can't be edited; says which and why.
        MeasureError: dropout is on, or how a call makes its weights is not known; says which and why.
    """
    checks.word("by", by, BY)
    top = checked_top(top)
    run = BackwardRun(model, inputs, metric)
    check_deterministic(run.trace)
    effects: list[Tensor | None] = []
    weights: list[Tensor | None] = []
    slopes: list[Tensor | None] = []
    for call, gradient in zip(run.trace, run.gradients(), strict=True):
        own = Patched(call)
        with torch.no_grad():
            effects.append(own.knocked_out(gradient))
            weights.append(own.weights)
            slopes.append(own.of_weights(gradient))
    notes = {"metric": run.value.item()}
    if by == "edge":
        table = edge_table(run.trace, {"knockout": effects, "weight": weights, "gradient": slopes}, top)
        table.attrs["units"] = {"knockout": "metric", "weight": "share", "gradient": "metric"}
        table.attrs.update(notes)
        return table
    sizes = [None if x is None else x.abs() for x in effects]
    columns = [
        Column(
            "edges", "metric", "What knocking out each of the head's edges would do, its magnitudes added up.",
            [None if x is None else x.sum((0, 2, 3)) for x in sizes],
        ),
        Column(
            "largest_edge", "metric", "The largest effect that knocking out one of the head's edges would have.",
            [None if x is None else x.amax((0, 2, 3)) for x in sizes],
        ),
    ]  # fmt: skip
    return head_table(run.trace, columns, notes=notes)
