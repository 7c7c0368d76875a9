"""One forward of a model, and what a metric's gradient is at the output of each of its attention calls.

To each output zeros are added that want a gradient. So nothing is written to the model's parameters, and models whose
parameters are frozen have gradients as well. All others follow from these: see :meth:`hookattn.Call.grad`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...api import edited, trace
from ...calls.call import Call
from ...calls.output_gradient import OutputGradient
from ...edit.base import Edit
from ...edit.call import call as edit_call
from ...edit.edited_call import EditedCall
from ...errors import GradientError, MeasureError
from ...traces import Trace
from .metric import Metric, checked_metric, metric_value

FIELDS = ("q", "k", "v", "bias", "scores", "mask", "sinks", "weights", "output")
"""What gradients of calls are derived of."""

Place = tuple[str, str, int]


class _Output:
    """The output of one call, or of a piece of one.

    Attributes:
        place: path, kind and step of the call.
        zeros: B H T E, what was added to it.
        cut: whether no gradient goes back through it, into what came before.
    """

    def __init__(self, call: EditedCall):
        self.place: Place = (call.site.path, call.site.kind, call.step)
        self.zeros = torch.zeros(call.value_shape, dtype=call.value_dtype, device=call.call.device, requires_grad=True)
        self.cut = False

    def added_to(self, value: Tensor) -> Tensor:
        """The output that the model goes on with."""
        if value.requires_grad:
            value = value.view_as(value)
            value.register_hook(self._passing)  # type: ignore[no-untyped-call]
        return value + self.zeros

    def _passing(self, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient) if self.cut else gradient


class BackwardRun:
    """A forward, whose metric can be gone back from.

    Args:
        model, inputs: as :func:`hookattn.trace` takes them.
        metric: of the output.
        edits: what else is changed.
        capture: which fields its trace has; ``output`` is among them.

    Attributes:
        trace: of the forward; ``trace.output`` is in its graph.
        value: the metric, a scalar in the graph.

    Raises:
        GradientError: inside ``torch.inference_mode()``, or the metric has no gradient.
        InputError: the metric returned no scalar.
        EditError: an attention call's output can't be edited; says which and why.
        MeasureError: calls were computed in pieces that do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        metric: Metric,
        *edits: Edit,
        capture: Collection[str] = FIELDS,
    ):
        checked_metric(metric)
        if torch.is_inference_mode_enabled():
            raise GradientError("nothing has a gradient in torch.inference_mode(); run this analysis outside of it.")
        outputs: list[_Output] = []

        def with_zeros(call: EditedCall) -> Tensor:
            outputs.append(_Output(call))
            return outputs[-1].added_to(call.value)

        with torch.enable_grad():
            several = [*edits, edit_call(with_zeros, "output")]
            self.trace: Trace = edited(model, inputs, *several, capture=tuple(capture))
            self.value = metric_value(metric, self.trace.output, gradient=True)
        self._outputs = outputs
        self._of_calls = _by_call(self.trace.calls, outputs)

    def gradients(self, cut: Collection[int] = (), last: bool = True) -> list[Tensor]:
        """The metric's gradient at the output of each call, B H T E; 0 where it does not depend on it.

        Args:
            cut: the places in the trace of calls through which no gradient goes back.
            last: whether no others will be asked for, so that the graph can go.

        Raises:
            GradientError: the metric depends on no attention call.
        """
        for i, several in enumerate(self._of_calls):
            for output in several:
                output.cut = i in cut
        leaves = [output.zeros for output in self._outputs]
        found = torch.autograd.grad(self.value, leaves, retain_graph=not last, allow_unused=True)
        if all(x is None for x in found):
            raise GradientError("the metric has a gradient, and depends on the output of no attention call.")
        by_leaf = {id(leaf): torch.zeros_like(leaf) if x is None else x for leaf, x in zip(leaves, found, strict=True)}
        return [
            _joined([by_leaf[id(output.zeros)] for output in several], call)
            for several, call in zip(self._of_calls, self.trace.calls, strict=True)
        ]


def _by_call(calls: Sequence[Call], outputs: Sequence[_Output]) -> list[list[_Output]]:
    """The outputs of each call; several where it was computed in pieces."""
    made: list[list[_Output]] = [[] for _ in calls]
    places: dict[Place, list[int]] = {}
    for i, call in enumerate(calls):
        places.setdefault((call.site.path, call.site.kind, call.step), []).append(i)
    for place, indices in places.items():
        here = [output for output in outputs if output.place == place]
        if len(here) == len(indices):
            for i, output in zip(indices, here, strict=True):
                made[i] = [output]
        elif len(indices) == 1 and here:
            made[indices[0]] = here
        else:
            raise MeasureError(
                f"{calls[indices[0]].site.label}: {len(here)} outputs were edited, and {len(indices)} calls recorded; "
                "which is of which is not known."
            )
    return made


def _joined(pieces: Sequence[Tensor], call: Call) -> Tensor:
    """The gradient of a whole call, of those of its pieces in their order."""
    if len(pieces) == 1:
        return pieces[0]
    shape = list(call.output.shape)
    for dim in range(3):
        if sum(x.shape[dim] for x in pieces) == shape[dim]:
            made = torch.cat(list(pieces), dim)
            if list(made.shape) == shape:
                return made
    raise MeasureError(f"{call.site.label}: it was computed in {len(pieces)} pieces that do not fit together.")


def graded(call: Call, of_output: Tensor) -> Call:
    """A call whose :meth:`~hookattn.Call.grad` is derived of a gradient of its output, B H T E."""
    made = replace(call)
    made.gradient = OutputGradient(place=of_output)
    return made


def plain_trace(model: nn.Module, inputs: Any, capture: Collection[str] = FIELDS) -> Trace:
    """A trace without gradients, of a model that runs as it is."""
    with torch.no_grad():
        return trace(model, inputs, capture=tuple(capture))
