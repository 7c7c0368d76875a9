"""Scores of heads for the viewer, of a table that an analyzer made or of plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import checks
from ..calls.call import Call
from ..errors import RenderError
from ..traces import Trace
from .json_values import json_value

_PLACE = ("call", "step", "layer", "stack", "kind", "path", "head", "role", "evidence")


def scores_of(scores: Any, trace: Trace | None = None) -> dict[str, Any]:
    """What the viewer takes: ``{measure: {"unit", "description", "values"}}`` and ``"roles"``, by call and stored head.

    Args:
        scores: a table of :func:`hookattn.analyze.report` or :func:`hookattn.analyze.measure`; or a mapping in this
            form, whose ``values`` have for each call a number, None or NaN for each head (lists, arrays or tensors),
            and whose ``"roles"``, if wanted, have for each call and head a list of names.
        trace: the trace they are of; a table needs it.

    Raises:
        RenderError: of another form, or of another number of calls.
    """
    if trace is not None and callable(getattr(scores, "to_dict", None)) and hasattr(scores, "columns"):
        return _scores_of_table(scores, trace)
    if not isinstance(scores, Mapping):
        raise RenderError(
            f"scores: expected a table of heads or a mapping of measures, and got {type(scores).__name__}."
        )
    made: dict[str, Any] = json_value(scores, "scores")
    for name, entry in made.items():
        table = entry if name == "roles" else entry.get("values") if isinstance(entry, dict) else None
        if not isinstance(table, list) or not all(isinstance(row, list) for row in table):
            rows = "a list for each call"
            expected = rows if name == "roles" else f'{{"unit", "description", "values": [{rows}]}}'
            raise RenderError(f"scores[{name!r}]: expected {expected}, and got {checks.printed(entry)}.")
        if trace is not None and len(table) != len(trace):
            raise RenderError(f"scores[{name!r}]: expected {len(trace)} rows, one for each call, and got {len(table)}.")
        if name != "roles":
            made[name] = {"unit": "", "description": "", **entry}
    return made


def _scores_of_table(table: Any, trace: Trace) -> dict[str, Any]:
    if not {"call", "head"} <= {*table.columns} or table.duplicated(["call", "head"]).any():
        raise RenderError(
            "scores: expected a table with a row for each call and head, as hookattn.analyze.report(trace) makes it, "
            f"and got one of {', '.join(map(str, table.columns))} with {len(table)} rows."
        )
    rows: dict[int, dict[int, dict[str, Any]]] = {}
    for row in table.to_dict("records"):
        rows.setdefault(int(row["call"]), {})[int(row["head"])] = row
    heads = [[rows.get(call.index, {}).get(head, {}) for head in _heads_of(call, rows)] for call in trace]
    units, said = table.attrs.get("units", {}), table.attrs.get("descriptions", {})
    made: dict[str, Any] = {
        name: {
            "unit": str(units.get(name, "")),
            "description": str(said.get(name, "")) or _first_sentence(str(name)),
            "values": json_value([[row.get(name) for row in call] for call in heads], f"scores[{name!r}]"),
        }
        for name in (units or [c for c in table.columns if c not in _PLACE])
        if name in table.columns
    }
    if "role" in table.columns:
        made["roles"] = [[[x for x in str(row.get("role", "")).split("; ") if x] for row in call] for call in heads]
    return made


def _heads_of(call: Call, rows: Mapping[int, Mapping[int, Any]]) -> range | tuple[int, ...]:
    return call.heads if call.heads is not None else range(max(rows.get(call.index, {-1: None})) + 1)


def _first_sentence(name: str) -> str:
    from ..analyze import MEASURES

    found = MEASURES.get(name.partition("(")[0])
    return (found.__doc__ or "").partition("\n")[0].replace("``", "") if found is not None else ""
