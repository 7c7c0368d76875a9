"""Measures of all calls of a trace, as one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .. import checks
from ..calls.key_tokens import has_tokens
from ..errors import HookattnError, MeasureError
from ..statistics.base import Statistic
from .call_view import View
from .frame import call_columns, table_of, views
from .labels import named_queries
from .reading import Reading

if TYPE_CHECKING:
    from pandas import DataFrame

    from ..traces import TraceLike

BY = ("head", "example", "query")


class TabledMeasure(Protocol):
    """What a table asks of a measure; :class:`~hookattn.analyze.Measure` is one."""

    @property
    def key(self) -> str:
        """The name of its column."""

    @property
    def unit(self) -> str:
        """``nats``, ``keys``, ``share``, …"""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What it is computed of."""

    def problem(self, view: View) -> str | None:
        """Why it is not defined for a call; None: it is."""

    def of(self, view: View) -> Reading:
        """Its value for each head of a call; raises MeasureError where it is not defined."""


def measure_table(
    trace: TraceLike, measures: Sequence[TabledMeasure], *, by: str = "head", real: Any = None, missing: bool = False
) -> DataFrame:
    """The table that :func:`hookattn.analyze.measure` returns, of measures that have different keys.

    Raises:
        MeasureError, FieldNotCaptured, SelectionError: as there.
    """
    import pandas as pd

    checks.word("by", by, BY)
    frames = [table_of(reading_columns(view, readings(view, measures, missing), by)) for view in views(trace, real)]
    table = pd.concat(frames, ignore_index=True)
    table.attrs["units"] = {m.key: m.unit for m in measures}
    return table


def readings(
    view: View, measures: Sequence[TabledMeasure], missing: bool = False, why: dict[str, str] | None = None
) -> dict[str, Reading | None]:
    """Each measure of one call by its key; None where it is not defined and may be missing. No more weights are formed
    at once than a block of heads has.

    Args:
        view: the call.
        measures: which ones.
        missing: whether a measure may be missing.
        why: gets the reason for each that is.

    Raises:
        HookattnError: see :func:`measure_table`.
    """
    reasons = {} if why is None else why
    blocks = [_readings_of_heads(part, measures, missing, reasons) for part in view.parts()]
    return {key: _of_all_heads([block[key] for block in blocks]) for key in blocks[0]}


def _of_all_heads(blocks: Sequence[Reading | None]) -> Reading | None:
    """One reading of those of blocks of heads."""
    found = [reading for reading in blocks if reading is not None]
    if len(found) < len(blocks):
        return None
    return found[0] if len(found) == 1 else Reading.joined(found)


def _readings_of_heads(
    view: View, measures: Sequence[TabledMeasure], missing: bool, reasons: dict[str, str]
) -> dict[str, Reading | None]:
    found: dict[str, Reading | None] = dict.fromkeys(m.key for m in measures)
    defined = []
    for m in measures:
        problem = m.problem(view) if missing else None
        if problem is None:
            defined.append(m)
        else:
            reasons.setdefault(m.key, problem)
    # One pass over a call computes the statistics of all measures. Should that fail, each measure asks for its own, so
    # that one lacking field leaves the others be.
    shared = [s for m in defined for s in m.statistics if view.positions is not None or not s.positional]
    try:
        view.prepare(shared)
    except HookattnError:
        if not missing:
            raise
    for m in defined:
        try:
            found[m.key] = m.of(view)
        except HookattnError as error:
            if not missing:
                raise type(error)(f"{m.key}: {error}") from error
            reasons.setdefault(m.key, str(error))
    return found


def reading_columns(view: View, found: dict[str, Reading | None], by: str) -> dict[str, Any]:
    """The columns of a call's part of a table: place, head, and each reading; ``by`` as in :func:`measure_table`."""
    b, h, t, _ = view.shape
    sizes = {"head": (h,), "example": (b, h), "query": (b, h, t)}[by]
    n = int(torch.tensor(sizes).prod())
    index = torch.meshgrid(*(torch.arange(x) for x in sizes), indexing="ij")
    head = torch.tensor(list(view.heads))[index[0 if by == "head" else 1]]
    made: dict[str, Any] = {**call_columns(view), "head": head.flatten().numpy()}
    if by != "head":
        made["example"] = index[0].flatten().numpy()
    if by == "query":
        made["query"] = torch.tensor(list(view.queries))[index[2]].flatten().numpy()
        if has_tokens(view.trace):
            made["token"] = [x for row in named_queries(view) for _ in range(h) for x in row]
    for key, reading in found.items():
        value = None if reading is None else _reading_values(key, view, reading, by)
        made[key] = torch.full((n,), torch.nan).numpy() if value is None else value.flatten().double().cpu().numpy()
    return made


def _reading_values(key: str, view: View, reading: Reading, by: str) -> Tensor:
    if by != "query":
        return reading.heads if by == "head" else reading.value
    if reading.rows is None:
        raise MeasureError(f"{key} of {view.where}: it is no mean over queries, so there is no value by query.")
    return reading.rows
