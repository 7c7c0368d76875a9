"""How much a metric moves when heads are scaled: head importance by gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...errors import InputError, MeasureError
from .backward import BackwardRun
from .head_table import Column, head_table
from .metric import Metric, checked_metric

if TYPE_CHECKING:
    from pandas import DataFrame


def head_importance(model: nn.Module, inputs: Any, metric: Metric | Sequence[Metric]) -> DataFrame:
    """The importance of each head by a gate on its output: ``I_h = E_x |∂m(x)/∂ξ_h|`` at ``ξ = 1`` (Michel et al. 2019,
    "Are sixteen heads really better than one?").

    The gate multiplies the head's output at all positions, so that ``∂m/∂ξ_h = Σ_{t,e} z_hte · ∂m/∂z_hte``: what
    ``edit.scale("output", gates)`` with leaf gates of 1 gets as a gradient, and, to first order, what the metric loses
    when the head is zeroed. One forward and one backward for each input; the model's parameters get no gradient.

    Args:
        model: any module whose attention can be edited, see :func:`hookattn.editing`. Gradients may be off for its
            parameters.
        inputs: as :func:`hookattn.trace` takes them; or a list of such, over which the mean is taken. A batch counts as
            one input: its gradient is that of the metric of the whole batch.
        metric: a function of the model's output that returns a scalar tensor; or one for each of the inputs.

    Returns:
        A pandas DataFrame as of :func:`hookattn.analyze.report`: ``call``, ``step``, ``layer``, ``stack``, ``kind``,
        ``path``, ``head``, ``importance`` and ``gate_gradient`` (the mean of the gradient with its sign: positive if
        the head raises the metric). ``attrs["metric"]`` is the mean of the metric.

    Raises:
        InputError: there is no input, as many metrics as inputs are wanted, or a metric returned no scalar.
        GradientError: the metric has no gradient, or no attention leads to it.
        EditError: the output of an attention call can't be edited; says which and why.
        MeasureError: inputs ran other calls than the first of them.
    """
    several = list(inputs) if isinstance(inputs, list) else [inputs]
    if not several:
        raise InputError("inputs=[]: expected inputs of the model, or a list of such.")
    metrics = [checked_metric(m) for m in metric] if isinstance(metric, (list, tuple)) else [checked_metric(metric)]
    if len(metrics) not in (1, len(several)):
        raise InputError(f"metric has {len(metrics)} functions for {len(several)} inputs; expected one, or as many.")
    metrics = metrics * len(several) if len(metrics) == 1 else metrics
    first: BackwardRun | None = None
    signed: list[Tensor] = []
    absolute: list[Tensor] = []
    total = 0.0
    for one, m in zip(several, metrics, strict=True):
        run = BackwardRun(model, one, m, capture=("output",))
        found = [
            (z.double() * dz.double()).sum((0, 2, 3))
            for z, dz in zip((call.output.detach() for call in run.trace), run.gradients(), strict=True)
        ]
        total += run.value.item()
        if first is None:
            first, signed, absolute = run, found, [x.abs() for x in found]
            continue
        _check_same(first, run)
        signed = [a + b for a, b in zip(signed, found, strict=True)]
        absolute = [a + b.abs() for a, b in zip(absolute, found, strict=True)]
    assert first is not None
    n = len(several)
    columns = [
        Column(
            "importance",
            "metric",
            "How much a gate on the head's output moves the metric (Michel et al. 2019).",
            [x / n for x in absolute],
        ),
        Column(
            "gate_gradient",
            "metric",
            "The gradient of that gate with its sign: positive where the head raises the metric.",
            [x / n for x in signed],
        ),
    ]
    return head_table(first.trace, columns, notes={"metric": total / n})


def _check_same(first: BackwardRun, run: BackwardRun) -> None:
    mine, theirs = ([(c.site.path, c.site.kind, c.step, c.output.shape[1]) for c in r.trace] for r in (first, run))
    if mine != theirs:
        raise MeasureError(
            f"an input ran {len(theirs)} attention calls that are not those {len(mine)} of the first input, so that "
            "there is no mean over both; analyse them one by one."
        )
