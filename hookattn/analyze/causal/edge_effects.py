"""What an edge of a head is worth: cut, and how much of that is direct."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ... import checks, edit
from ...edit.base import Edit
from ...errors import InputError
from ..frame import table_of
from .metric import Metric
from .running import Entries, Job, Runner, field_of, of_entries
from .selecting import check_options, chosen_numbers, columns_of, one_call

if TYPE_CHECKING:
    from pandas import DataFrame

_EDGES = "edges as (layer, head, query, key), such as [(5, 1, -1, 3)]"


def edge_effects(
    model: nn.Module,
    inputs: Any,
    metric: Metric,
    edges: Iterable[tuple[int, int, int, int]],
    *,
    stack: str | None = None,
    kind: str | None = None,
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> DataFrame:
    """The total, direct and indirect effect of edges i → j of heads: of query i being able to attend to key j (Vig et
    al. 2020, "Investigating gender bias in language models using causal mediation analysis"; Pearl 2001, "Direct and
    indirect effects").

    The intervention is a knock-out: the key is hidden from the query in that head, and the rest of its row renormalises
    (:func:`hookattn.edit.knockout`). The mediators are all attention heads that run after it. With m the metric::

        total    = m(edge knocked out) − m(plain)
        direct   = m(edge knocked out, the patterns and outputs of all later heads as in the plain run) − m(plain)
        indirect = total − direct

    ``direct`` is Pearl's natural direct effect: what reaches the output through the residual stream, its norms and MLPs
    alone. ``indirect`` is what later heads make of it; as models are not linear, it holds the interaction of both, too
    (the total indirect effect of Robins & Greenland 1992, and not the natural one, which would change the mediators
    alone).

    Args:
        model: any; it is run without gradients, in the mode that it is in.
        inputs: as :func:`hookattn.trace` takes them.
        metric: function of what the model returns; a scalar.
        edges: layer, head, query and key of each; negative positions from the end.
        stack, kind: of the sites, where a layer has several.
        batch, progress: as in :func:`hookattn.analyze.activation_patching`; progress counts edges, and is called as
            their direct effect is known.

    Returns:
        A pandas DataFrame with ``call``, ``step``, ``layer``, ``stack``, ``kind``, ``path``, ``head``, ``query``,
        ``key``, ``weight`` (the mean over the batch, of the plain run), ``total``, ``direct`` and ``indirect``.
        ``attrs`` has ``plain``, the metric of the plain run, ``units``, ``descriptions`` and ``runs``.

    Raises:
        InputError: no edges, or the metric returns no scalar.
        SelectionError: a layer, head, query or key that there isn't.
        EditError: an attention cannot be edited; names it, and why.
    """
    wanted = [checks.several_ints("edges", edge) for edge in checks.items_of(edges) or []]
    if not wanted or any(len(edge) != 4 for edge in wanted):
        raise checks.wrong("edges", edges, _EDGES, InputError)
    check_options(stack, kind, progress)
    runner = Runner(model, inputs, metric, ["weights"], batch)
    calls = runner.trace.calls
    found: list[tuple[int, int, int, int]] = []
    for layer, head, query, key in wanted:
        i = one_call(runner.trace, layer, stack, kind)
        _, h, t, s = field_of(calls[i], "weights").shape
        sizes = (("heads", head, h), ("queries", query, t), ("keys", key, s))
        h_, q_, k_ = (chosen_numbers(name, [n], size, calls[i])[0] for name, n, size in sizes)
        found.append((i, h_, q_, k_))
    order = sorted(range(len(found)), key=lambda n: found[n][0])  # those of one call together
    jobs = {n: Job((found[n][0],), _cut(runner, *found[n])) for n in order}
    total = dict(zip(order, runner.values([jobs[n] for n in order]), strict=True))
    direct: dict[int, float] = {}
    for i in dict.fromkeys(found[n][0] for n in order):
        own = [n for n in order if found[n][0] == i]
        after = range(i + 1, len(calls))

        def freeze(n: int, after: range = after) -> list[Edit]:
            return [
                edit.patch("output", runner.repeated(field_of(calls[j], "output"), n), **runner.where(j)) for j in after
            ]

        def advance(n: int, before: int = len(direct)) -> None:
            if progress is not None:
                progress(before + n)

        values = runner.values([jobs[n] for n in own], freeze, after, advance)
        direct |= dict(zip(own, values, strict=True))
    return _table(runner, found, [total[n] for n in range(len(found))], [direct[n] for n in range(len(found))])


def _cut(runner: Runner, i: int, head: int, query: int, key: int) -> Callable[[Entries], list[Edit]]:
    def edits(entries: Entries) -> list[Edit]:
        return [edit.knockout(**of_entries(runner.where(i), entries, heads=[head], queries=[query], keys=[key]))]

    return edits


def _table(
    runner: Runner, edges: Sequence[tuple[int, int, int, int]], total: Sequence[float], direct: Sequence[float]
) -> DataFrame:
    calls = runner.trace.calls
    plain = runner.value
    made: dict[str, Any] = {
        **columns_of([calls[i] for i, *_ in edges]),
        **{name: [edge[n] for edge in edges] for n, name in ((1, "head"), (2, "query"), (3, "key"))},
        "weight": [float(field_of(calls[i], "weights")[:, h, q, k].double().mean()) for i, h, q, k in edges],
        "total": [value - plain for value in total],
        "direct": [value - plain for value in direct],
        "indirect": [a - b for a, b in zip(total, direct, strict=True)],
    }
    table = table_of(made)
    table.attrs |= {
        "plain": plain,
        "units": {"weight": "share", "total": "metric", "direct": "metric", "indirect": "metric"},
        "descriptions": {
            "weight": "The attention of the edge in the plain run.",
            "total": "The metric with the edge cut less that without.",
            "direct": "The same with all later heads as in the plain run.",
            "indirect": "What later heads make of it: the total less the direct effect.",
        },
        "runs": dict(runner.notes),
    }
    return table
