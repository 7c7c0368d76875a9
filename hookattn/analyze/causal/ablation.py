"""Ablation of heads one by one: what a metric loses without each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ... import checks, edit
from ...calls.call import Call
from ...edit.base import Edit
from ..frame import table_of
from .metric import Metric
from .running import Entries, Job, Runner, field_of, of_entries
from .selecting import check_options, chosen_calls, chosen_numbers, columns_of, wanted_numbers

if TYPE_CHECKING:
    from pandas import DataFrame

BY = ("zero", "mean", "resample")
"""What takes the place of a head's output."""
OVER = ("positions", "batch")


def head_ablation(
    model: nn.Module,
    inputs: Any,
    metric: Metric,
    *,
    by: str = "zero",
    over: str = "positions",
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    stack: str | None = None,
    kind: str | None = None,
    seed: int = 0,
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> DataFrame:
    """The effect of taking each head's output away (Michel et al. 2019, "Are sixteen heads really better than one?")::

        effect = m(head ablated) − m(plain)

    so that a head that helps has a negative effect on a log-probability.

    Args:
        model: any; it is run without gradients, in the mode that it is in.
        inputs: as :func:`hookattn.trace` takes them.
        metric: function of what the model returns; a scalar.
        by: what takes the place of the output: ``"zero"``; ``"mean"``, its mean (Wang et al. 2022); ``"resample"``,
            that of another position or example (Chan et al. 2022, "Causal scrubbing").
        over: of ``mean`` and ``resample``: ``"positions"`` of the same batch entry, or the ``"batch"``.
        layers, heads, stack, kind: which heads; None: all.
        seed: of the draws of ``resample``.
        batch, progress: as in :func:`hookattn.analyze.activation_patching`.

    Returns:
        A pandas DataFrame with ``call``, ``step``, ``layer``, ``stack``, ``kind``, ``path``, ``head``, ``value`` (the
        metric without the head) and ``effect``. ``attrs`` has ``plain``, the metric with all heads, ``units``,
        ``descriptions`` and ``runs``.

    Raises:
        InputError: the metric returns no scalar; SelectionError: a layer or head that there isn't, or an unknown
        option; EditError: an output cannot be exchanged, or there is nothing to resample from.
    """
    check_options(stack, kind, progress)
    layers, heads = wanted_numbers("layers", layers), wanted_numbers("heads", heads)
    ablation = Ablation(model, inputs, metric, by=by, over=over, seed=seed, batch=batch)
    places = ablation.places(layers, heads, stack, kind)
    return ablation.table(places, [x for part in ablation.values(places, progress) for x in part])


class Ablation:
    """The runs of :func:`head_ablation`, whose arguments these are; layer by layer, for who goes on where it stopped.

    Attributes:
        runner: what runs.
    """

    def __init__(
        self, model: nn.Module, inputs: Any, metric: Metric, *, by: str, over: str, seed: int, batch: int | None
    ):
        self.by, self.over = checks.word("by", by, BY), checks.word("over", over, OVER)
        self.seed = checks.whole("seed", seed, 0)
        self.runner = Runner(model, inputs, metric, batch=batch)

    def places(
        self,
        layers: int | Sequence[int] | None = None,
        heads: int | Sequence[int] | None = None,
        stack: str | None = None,
        kind: str | None = None,
    ) -> list[tuple[int, int]]:
        """The heads that are meant: place of the call, and number."""
        calls = self.runner.trace.calls
        return [
            (i, head)
            for i in chosen_calls(self.runner.trace, layers, stack, kind)
            for head in chosen_numbers("heads", heads, field_of(calls[i], "output").shape[1], calls[i])
        ]

    def values(
        self, places: Sequence[tuple[int, int]], progress: Callable[[int], None] | None = None
    ) -> Iterator[list[float]]:
        """The metric without each of some heads, call by call."""
        done = 0
        for i in dict.fromkeys(i for i, _ in places):
            jobs = [Job((i,), self._without(i, head)) for place, head in places if place == i]

            def advance(n: int, before: int = done) -> None:
                if progress is not None:
                    progress(before + n)

            yield self.runner.values(jobs, progress=advance)
            done += len(jobs)

    def _without(self, i: int, head: int) -> Callable[[Entries], list[Edit]]:
        def edits(entries: Entries) -> list[Edit]:
            where = of_entries(self.runner.where(i), entries, heads=[head])
            if self.by == "zero":
                return [edit.zero("output", **where)]
            if self.by == "mean":
                return [edit.mean("output", self.over, **where)]
            return [edit.resample("output", self.over, seed=self.seed, **where)]

        return edits

    def table(self, places: Sequence[tuple[int, int]], values: Sequence[float]) -> DataFrame:
        """The table of some heads."""
        calls: list[Call] = [self.runner.trace.calls[i] for i, _ in places]
        plain = self.runner.value
        table = table_of(
            {
                **columns_of(calls),
                "head": [head for _, head in places],
                "value": list(values),
                "effect": [value - plain for value in values],
            }
        )
        table.attrs |= {
            "plain": plain,
            "units": {"value": "metric", "effect": "metric"},
            "descriptions": {
                "value": "The metric without the head.",
                "effect": "The metric without the head less that with all heads.",
            },
            "runs": self.runner.notes,
        }
        return table
