"""Attribution patching: what patching each head would do to a metric, of one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import checks
from ...errors import MeasureError
from ...traces import Trace
from .backward import FIELDS, BackwardRun, plain_trace
from .head_table import AXES, Column, head_table
from .metric import Metric, metric_value
from .nodes import Patched, check_counterparts, check_deterministic, checked_nodes

if TYPE_CHECKING:
    from pandas import DataFrame


def attribution_patching(
    model: nn.Module,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    *,
    nodes: str | Sequence[str] = "output",
    by: str = "head",
) -> DataFrame:
    """Attribution patching of heads: ``(n_corrupt − n_clean) · ∂m/∂n`` at the clean run, for every node n (Nanda 2023,
    "Attribution patching: activation patching at industrial scale"; Syed et al. 2023, "Attribution patching outperforms
    automated circuit discovery").

    It is the first-order estimate of ``m(clean run with n patched from the corrupt run) − m(clean run)``, for all nodes
    of two forwards and one backward: exact where the metric is linear in the node. The model's parameters get no
    gradient.

    Args:
        model: any module whose attention can be edited, see :func:`hookattn.editing`; in eval mode.
        clean, corrupt: inputs as :func:`hookattn.trace` takes them, with as many tokens and batch entries.
        metric: a function of the model's output that returns a scalar tensor.
        nodes: ``output`` (a head's output, before the output projection), ``q``, ``k``, ``v``. Of grouped heads the
            part of each query head; that of a key head is their sum.
        by: ``"head"``: patched at all positions and batch entries; ``"example"``: at one batch entry; ``"position"``:
            at one position: of a query for ``output`` and ``q``, of a key for ``k`` and ``v``.

    Returns:
        A pandas DataFrame as of :func:`hookattn.analyze.report`: ``call``, ``step``, ``layer``, ``stack``, ``kind``,
        ``path``, ``head`` (and ``example`` or ``position``), and ``attribution(output)`` and so on, in units of the
        metric. ``attrs["clean"]`` and ``attrs["corrupt"]`` are the metric of both runs.

    Raises:
        InputError: the metric returned no scalar. SelectionError: no such node, or ``by``.
        GradientError: the metric has no gradient, or no attention leads to it.
        EditError: the output of an attention call can't be edited; says which and why.
        MeasureError: the calls of both runs have other shapes, dropout is on, or a node is not known in a call; says
            which and why.
    """
    names = checked_nodes(nodes)
    checks.word("by", by, AXES)
    run, other = runs_of_both(model, clean, corrupt, metric)
    values: dict[str, list[Tensor | None]] = {node: [] for node in names}
    for a, b, gradient in zip(run.trace, other, run.gradients(), strict=True):
        pair = Patched(a, b)
        with torch.no_grad():
            for node in names:
                values[node].append(summed(pair.linear(node, gradient), by))
    said = "What patching the head's {} would do, to first order (Nanda 2023)."
    return nodes_table(run, other, metric, "attribution", said, values, by)


def nodes_table(
    run: BackwardRun,
    other: Trace,
    metric: Metric,
    name: str,
    description: str,
    values: dict[str, list[Tensor | None]],
    by: str,
) -> DataFrame:
    """The table of numbers of nodes, by their names, for each call of a run."""
    for i, call in enumerate(run.trace):
        if len({x.shape for own in values.values() if (x := own[i]) is not None}) > 1:
            raise MeasureError(
                f"call {call.index} ({call.site.label}): its queries and keys are not as many, so that positions of "
                "output and q, and those of k and v, have no rows in common; ask for them one after the other."
            )
    columns = [
        Column(f"{name}({node})", "metric", description.format(node), several) for node, several in values.items()
    ]
    with torch.no_grad():
        notes = {"clean": run.value.item(), "corrupt": metric_value(metric, other.output).item()}
    return head_table(run.trace, columns, by, notes)


def runs_of_both(model: nn.Module, clean: Any, corrupt: Any, metric: Metric) -> tuple[BackwardRun, Trace]:
    """The clean run, of which gradients can be taken, and a trace of the other.

    Raises:
        MeasureError: they do not fit; and the errors of :class:`BackwardRun`.
    """
    run = BackwardRun(model, clean, metric)
    check_deterministic(run.trace)
    other = plain_trace(model, corrupt, tuple(x for x in FIELDS if x in ("q", "k", "v", "output")))
    check_counterparts(run.trace, other)
    return run, other


def summed(effects: Tensor, by: str) -> Tensor:
    """B H N as a table by ``by`` has it."""
    return effects.sum((0, 2)) if by == "head" else effects.sum(2) if by == "example" else effects.sum(0)
