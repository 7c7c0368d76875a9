"""One table of all heads with all scores, each head named where the evidence is clear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import MeasureError
from ..chance import Chance
from ..frame import table_of, views
from ..measures.base import Measure
from ..registry import MEASURES, resolve
from ..table import reading_columns, readings
from .roles import evidence_measures, roles_of

if TYPE_CHECKING:
    from pandas import DataFrame

    from ...traces import TraceLike


def report(trace: TraceLike, measures: Iterable[str | Measure] | None = None, *, real: Any = None) -> DataFrame:
    """All heads of a trace with all measures, and what each head is called.

    A role is named where its evidence is clear: the measure is large (see :data:`hookattn.analyze.ROLES`), and at least
    twice what attention that is the same for all keys would give under the same mask. The evidence stands beside it.

    Args:
        trace: in memory, loaded, compact, or of statistics alone; a measure that it lacks the fields for is left out,
            and ``attrs["left_out"]`` says why.
        measures: names or objects, beside those that roles are read off; None: all that need nothing but the trace.
        real: bool or 0/1, B S: True = a real token; see :func:`hookattn.analyze.measure`.

    Returns:
        A pandas DataFrame: ``call``, ``step``, ``layer``, ``stack``, ``kind``, ``path``, ``head``, ``role`` (several
        are parted by semicolons; empty: none is clear), ``evidence``, and one column for each measure, NaN where it is
        not defined. ``attrs["units"]`` has the units.

    Raises:
        MeasureError: the trace has no calls, or nothing can be measured.
        SelectionError: an unknown measure.
    """
    import pandas as pd

    chosen = resolve([*(MEASURES if measures is None else resolve(measures, empty=True)), *evidence_measures()])
    chance = Chance(list(evidence_measures()))
    frames: list[DataFrame] = []
    left_out: dict[str, str] = {}
    for view in views(trace, real):
        found = readings(view, chosen, missing=True, why=left_out)
        frame = table_of(reading_columns(view, found, "head"))
        _insert_roles(frame, list(found), chance.of(view))
        frames.append(frame)
    table = pd.concat(frames, ignore_index=True)
    empty = [m.key for m in chosen if table[m.key].isna().all()]
    if len(empty) == len(chosen):
        raise MeasureError(f"nothing can be measured: {left_out.get(chosen[0].key, 'no row counts')}")
    table = table.drop(columns=empty)
    table.attrs["units"] = {m.key: m.unit for m in chosen if m.key not in empty}
    table.attrs["left_out"] = {key: left_out.get(key, "no row that it is defined for") for key in empty}
    return table


def _insert_roles(frame: DataFrame, keys: Sequence[str], chance: Mapping[str, float]) -> None:
    """Put ``role`` and ``evidence`` in front of the measures of one call.

    Args:
        frame: a row for each head.
        keys: the columns of its measures.
        chance: what uniform attention has, by their keys.
    """
    lines = zip(*(frame[key].tolist() for key in keys), strict=True)
    roles = [roles_of(dict(zip(keys, line, strict=True)), chance) for line in lines]
    place = list(frame.columns).index(keys[0])
    frame.insert(place, "role", ["; ".join(own.role.name for own in several) for several in roles])
    frame.insert(place + 1, "evidence", ["; ".join(own.evidence for own in several) for several in roles])
