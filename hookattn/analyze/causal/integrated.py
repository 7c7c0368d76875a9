"""Integrated gradients over the patterns of heads: what the metric has of each weight, on the way from no attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import checks
from ...attention.gradients import applied_gradient
from ...calls.call import Call
from ...calls.extents import evenly_grouped
from ...edit.scale_edit import scale
from ...errors import MeasureError, SelectionError
from ...traces import Trace
from .backward import BackwardRun, plain_trace
from .edge_table import BY, checked_top, edge_table
from .head_table import Column, head_table
from .metric import Metric, batch_parts, checked_metric, metric_value
from .nodes import Patched, check_deterministic
from .selecting import check_options, wanted_numbers

if TYPE_CHECKING:
    from pandas import DataFrame

_AT_ONCE = 8
# A batch of several steps has to give the model's own metric at the step 1, up to so much of its size.
_SAME = {torch.float64: 1e-9, torch.float32: 1e-4}


def integrated_gradients(
    model: nn.Module,
    inputs: Any,
    metric: Metric,
    *,
    layer: int | Sequence[int] | None = None,
    stack: str | None = None,
    kind: str | None = None,
    heads: int | Sequence[int] | None = None,
    steps: int = 20,
    at_once: int | None = None,
    by: str = "head",
    top: int = 100,
) -> DataFrame:
    """Integrated gradients of the weights of heads (Sundararajan et al. 2017, "Axiomatic attribution for deep
    networks"; Hao et al. 2021, "Self-attention attribution"): ``A ⊙ ∫₀¹ ∂m(αA)/∂A dα``.

    The heads of one call are scaled together from 0 to 1, each call by itself, with ``edit.scale("weights", α)``; the
    integral is a Gauss–Legendre sum of ``steps`` points. What all edges of the call get adds up to what its attention
    is worth, ``m(A) − m(0)`` (completeness); ``attrs["completeness"]`` has both, so that it is seen whether the steps
    were enough. Each call costs ``steps`` forwards and backwards.

    Args:
        model: any module whose attention weights can be edited, see :func:`hookattn.editing`; in eval mode.
        inputs: as :func:`hookattn.trace` takes them.
        metric: a function of the model's output that returns a scalar tensor.
        layer: of which layers, negative ones from the end; all by default.
        stack, kind: of which sites.
        heads: which heads are scaled together, the others staying as they are; by default all.
        steps: of the integral.
        at_once: so many steps are run as one batch, where tensors of the inputs have the batch first, as have the
            outputs, and the model's metric comes out the same; 1: one after the other. By default 8 where that holds.
        by: ``"head"``, or ``"edge"``: a row for each of the edges that get most.
        top: how many edges.

    Returns:
        A pandas DataFrame. By head as of :func:`hookattn.analyze.report`: the columns of a call, ``head``,
        ``integrated`` (the sum over its edges, in units of the metric) and ``integrated_magnitude`` (of their
        magnitudes). By edge as of :func:`edge_attribution`, with ``integrated`` and ``weight``.
        ``attrs["completeness"]``: call → (the sum over all edges, ``m(A) − m(0)``); ``attrs["metric"]``.

    Raises:
        InputError: the metric returned no scalar. SelectionError: no such call, head, ``by``, or number of steps.
        GradientError: the metric has no gradient, or no attention leads to it.
        EditError: the weights of a call can't be edited; says which and why.
        MeasureError: dropout is on; or ``at_once`` was given, and the model does not take several steps as one batch.
    """
    checked_metric(metric)
    checks.word("by", by, BY)
    top, steps = checked_top(top), checks.whole("steps", steps, 1)
    wanted = None if at_once is None else checks.whole("at_once", at_once, 1)
    check_options(stack, kind)
    layer, chosen = wanted_numbers("layer", layer), wanted_numbers("heads", heads)
    clean = plain_trace(model, inputs)
    check_deterministic(clean)
    with torch.no_grad():
        value = metric_value(metric, clean.output)
    places = _places(clean, layer, stack, kind)
    rule = _legendre(steps)
    results: list[Tensor | None] = [None] * len(clean)
    completeness: dict[int, tuple[float, float]] = {}
    for place in places:
        call = clean[place]
        own = _heads_of(call, chosen)
        path = _Path(model, inputs, metric, call, place, own, value, wanted)
        found, zero = path.integral(rule)
        results[place] = found
        completeness[place] = (found.sum().item(), value.item() - zero)
    notes = {"metric": value.item(), "completeness": completeness}
    weights = [None if x is None else call.weights for call, x in zip(clean, results, strict=True)]
    if by == "edge":
        table = edge_table(clean, {"integrated": results, "weight": weights}, top)
        table.attrs["units"] = {"integrated": "metric", "weight": "share"}
        table.attrs.update(notes)
        return table
    columns = [
        Column(
            "integrated", "metric", "What the metric has of the head's attention, by integrated gradients.",
            [None if x is None else x.sum((0, 2, 3)) for x in results],
        ),
        Column(
            "integrated_magnitude", "metric", "The same with the magnitude of each edge (Hao et al. 2021).",
            [None if x is None else x.abs().sum((0, 2, 3)) for x in results],
        ),
    ]  # fmt: skip
    return head_table(clean, columns, notes=notes)


def _places(trace: Trace, layer: Any, stack: str | None, kind: str | None) -> list[int]:
    """The places of the calls that are meant."""
    found = [call.index for call in trace.select(layer=layer, stack=stack, kind=kind)]
    for i in found:
        site, step = trace[i].site, trace[i].step
        if sum((c.site, c.step) == (site, step) for c in trace) > 1:
            raise MeasureError(
                f"{site.label}: it ran several times in one forward, and its weights can be scaled in all of these "
                "alone; choose other calls with layer=, stack= or kind=."
            )
    return found


def _heads_of(call: Call, chosen: list[int] | None) -> list[int] | None:
    if chosen is None:
        return None
    count = call.weights.shape[1]
    for head in chosen:
        if not -count <= head < count:
            raise SelectionError(f"heads={chosen}: {call.site.label} has {count} heads, counted from 0.")
    return sorted({head % count for head in chosen})


def _legendre(steps: int) -> list[tuple[float, float]]:
    """Points in 0 to 1, and their weights."""
    from numpy.polynomial.legendre import leggauss

    points, weights = leggauss(steps)
    return [((x + 1) / 2, w / 2) for x, w in zip(points.tolist(), weights.tolist(), strict=True)]


class _Path:
    """The way from no weights to all of one call.

    Args:
        model, inputs, metric: as given.
        call, place: the call of the clean run, and its place in that.
        heads: which are scaled; None: all.
        value: the metric of the clean run.
        at_once: how many steps a batch has; None: to be found out.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        metric: Metric,
        call: Call,
        place: int,
        heads: list[int] | None,
        value: Tensor,
        at_once: int | None,
    ):
        self.model, self.inputs, self.metric = model, inputs, metric
        self.call, self.place, self.heads, self.value, self.at_once = call, place, heads, value, at_once
        self.v = evenly_grouped(call, call.v)
        _ = Patched(call).weights  # raises where something else met the values

    def integral(self, rule: Sequence[tuple[float, float]]) -> tuple[Tensor, float]:
        """B H T S in float64, and the metric at 0; heads that are not scaled have 0."""
        # The step 1 is the model's own run: what says whether a batch of steps is run as they are one by one.
        points = [(0.0, 0.0), (1.0, 0.0), *rule]
        size = _AT_ONCE if self.at_once is None else self.at_once
        total: Tensor | None = None
        at: dict[float, float] = {}
        while points:
            part, rest = points[:size], points[size:]
            found = self._gradients([alpha for alpha, _ in part])
            if found is None:
                if self.at_once is not None:
                    raise MeasureError(
                        f"{self.call.site.label}: at_once={self.at_once}: a batch of several steps does not give what "
                        "each gives alone, as where the batch is not the first axis of all inputs; say at_once=1."
                    )
                size = 1
                continue
            points = rest
            for (alpha, weight), (value, gradient) in zip(part, found, strict=True):
                at.setdefault(alpha, value)
                if weight:
                    total = gradient * weight if total is None else total + gradient * weight
        assert total is not None
        made = total * self.call.weights.double()
        if self.heads is not None:
            kept = torch.zeros(made.shape[1], dtype=torch.bool, device=made.device)
            kept[self.heads] = True
            made = made * kept[:, None, None]
        return made, at[0.0]

    def _gradients(self, alphas: Sequence[float]) -> list[tuple[float, Tensor]] | None:
        """For each step the metric and the gradient of the weights, B H T S; None: they can't be run as one batch."""
        n, call = len(alphas), self.call
        b = call.weights.shape[0]
        inputs = self.inputs if n == 1 else repeated(self.inputs, b, n)
        if inputs is None:
            return None
        gates = torch.tensor(alphas, dtype=torch.float64).repeat_interleave(b).view(-1, 1, 1, 1)
        where: Any = {
            "path": call.site.path, "kind": call.site.kind, "layer": call.site.layer, "step": call.step,
            "heads": self.heads,
        }  # fmt: skip
        values: list[Tensor] = []
        own = scale("weights", gates if n > 1 else alphas[0], **where)
        try:
            run = BackwardRun(self.model, inputs, _of_parts(self.metric, b, n, values), own, capture=("output",))
        except Exception:
            if n == 1:
                raise
            return None  # whatever is wrong with a batch of several steps: each is run alone, and raises what it has
        of_output = run.gradients()[self.place]
        if of_output.shape[0] != n * b or not self._same(alphas, values):
            return None
        found = [applied_gradient(x, self.v).double() for x in torch.split(of_output, b)]
        return [(value.item(), x) for value, x in zip(values, found, strict=True)]

    def _same(self, alphas: Sequence[float], values: Sequence[Tensor]) -> bool:
        if 1.0 not in alphas or len(alphas) == 1:
            return True
        there, clean = values[list(alphas).index(1.0)].detach(), self.value
        return bool((there - clean).abs() <= _SAME.get(clean.dtype, 3e-2) * max(1.0, float(clean.abs())))


def _of_parts(metric: Metric, b: int, n: int, values: list[Tensor]) -> Callable[[Any], Tensor]:
    """The sum of a metric over the parts of a batch; each value is put into a list."""

    def total(output: Any) -> Tensor:
        values[:] = [metric_value(metric, part, gradient=True) for part in batch_parts(output, n * b, n)]
        return torch.stack(values).sum()

    return total


def repeated(inputs: Any, batch: int, times: int) -> Any:
    """Inputs of a model with each batch several times over, part after part; None: no tensor has the batch first."""
    found = 0

    def one(x: Any) -> Any:
        nonlocal found
        if isinstance(x, Tensor) and x.dim() and x.shape[0] == batch:
            found += 1
            return x.repeat(times, *(1,) * (x.dim() - 1))
        return x

    if isinstance(inputs, Mapping):
        made: Any = {key: one(x) for key, x in inputs.items()}
    else:
        made = tuple(map(one, inputs)) if isinstance(inputs, tuple) else one(inputs)
    return made if found else None
