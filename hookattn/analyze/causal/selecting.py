"""Which calls and heads an analysis is of, and the table of what it has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ... import checks
from ...calls.call import Call
from ...errors import MeasureError, SelectionError
from ...printable import printable
from ...traces import Trace
from ..frame import place_columns, table_of

if TYPE_CHECKING:
    from pandas import DataFrame

    from .running import Runner


def wanted_numbers(name: str, value: Any) -> list[int] | None:
    """Layers or heads as a caller gives them, before the model runs; None: all.

    Raises:
        SelectionError: they are no ints, or none.
    """
    found = None if value is None else checks.several_ints(name, value)
    if found is not None and not found:
        raise SelectionError(f"{name}=[] selects nothing; leave it out to select all.")
    return found


def check_options(stack: Any, kind: Any, progress: Any = None) -> None:
    """What else a caller gives that can be told to be wrong before the model runs.

    Raises:
        InputError: ``stack`` or ``kind`` is no text, or ``progress`` no function.
    """
    for name, value in (("stack", stack), ("kind", kind)):
        if value is not None:
            checks.text(name, value)
    if progress is not None:
        checks.function("progress", progress)


def chosen_calls(
    trace: Trace, layers: int | Sequence[int] | None, stack: str | None = None, kind: str | None = None
) -> list[int]:
    """The places of some calls in a trace.

    Raises:
        SelectionError: there is no such layer, or nothing is left.
    """
    several = [i for i, c in enumerate(trace.calls) if stack in (None, c.site.stack) and kind in (None, c.site.kind)]
    if not several:
        runs = sorted({f"{c.site.stack} {c.site.kind}" for c in trace.calls})
        raise SelectionError(
            f"stack={stack!r}, kind={kind!r}: the model runs no such attention; it runs {', '.join(runs)}."
        )
    if layers is None:
        return several
    known = sorted({n for i in several if (n := trace.calls[i].site.layer) is not None})
    wanted = set()
    for number in checks.several_ints("layers", layers):
        n = number + (known[-1] + 1 if known else 0) if number < 0 else number
        if n not in known:
            raise SelectionError(
                f"layers: there is no layer {number}; there are {', '.join(map(str, known)) or 'none'}."
            )
        wanted.add(n)
    if not wanted:
        raise SelectionError("layers=[] selects nothing; leave it out to select all.")
    return [i for i in several if trace.calls[i].site.layer in wanted]


def one_call(trace: Trace, layer: int, stack: str | None = None, kind: str | None = None) -> int:
    """The place of the one call of a layer.

    Raises:
        SelectionError: there is none, or several.
    """
    found = chosen_calls(trace, [layer], stack, kind)
    if len(found) > 1:
        there = [printable(trace.calls[i].site.path) for i in found]
        raise SelectionError(
            f"layer {layer} has {len(found)} attention calls ({', '.join(there)}); say stack= or kind=."
        )
    return found[0]


def chosen_numbers(name: str, wanted: Any, there: int, call: Call) -> list[int]:
    """Heads or positions of a call; None: all.

    Raises:
        SelectionError: one is not there.
    """
    if wanted is None:
        return list(range(there))
    found = checks.several_ints(name, wanted)
    for i in found:
        if not -there <= i < there:
            raise SelectionError(f"{name}: {call.site.label} has {there} {name}, counted from 0, and no {i}.")
    return sorted({i % there for i in found})


def effects_table(
    calls: Sequence[Call],
    columns: Mapping[str, Sequence[Any]],
    found: Sequence[float],
    runner: Runner,
    whole: float,
    values: Mapping[str, float],
) -> DataFrame:
    """A row for each run: where, ``value``, ``effect`` and the share of the whole effect.

    Args:
        calls: of each row.
        columns: what else says which it is.
        found: the metric of each.
        runner: of the runs.
        whole: the metric of the other run less that of the base run.
        values: the metric of both runs, by their names.
    """
    if not found:
        raise MeasureError("nothing was selected that can be patched.")
    effects = [value - runner.value for value in found]
    made = {
        **columns_of(calls),
        **columns,
        "value": list(found),
        "effect": effects,
        "restored": [effect / whole if whole else float("nan") for effect in effects],
    }
    table = table_of(made)
    table.attrs |= {
        **values,
        "units": {"value": "metric", "effect": "metric", "restored": "share"},
        "descriptions": {
            "value": "The metric of the patched run.",
            "effect": "The metric of the patched run less that of the run that is patched.",
            "restored": "The effect as a share of the difference between the two runs.",
        },
        "runs": dict(runner.notes),
    }
    return table


def columns_of(calls: Sequence[Call]) -> dict[str, list[Any]]:
    """The columns that say which calls rows are of."""
    rows = [place_columns(call) for call in calls]
    return {name: [row[name] for row in rows] for name in rows[0]}
