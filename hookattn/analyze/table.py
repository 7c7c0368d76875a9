"""Measures of all calls of a trace, as one table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import HookattnError, MeasureError, SelectionError
from .frame import call_columns, views
from .labels import sequences
from .measure import Measure, Reading
from .registry import resolve
from .view import View

if TYPE_CHECKING:
    from pandas import DataFrame

    from ..trace import Trace

BY = ("head", "example", "query")


def measure(
    trace: Trace,
    measures: str | Measure | Iterable[str | Measure],
    *,
    by: str = "head",
    real: Any = None,
    missing: bool = False,
) -> DataFrame:
    """Measures of every head of a trace; what they share is computed once.

    Args:
        trace: in memory, loaded, or compact; with weights, or what they can be derived of, or the statistics that the
            measures are made of (``capture=hookattn.analyze.capture(…)``).
        measures: names or :class:`Measure` objects.
        by: ``"head"``: a row for each call and head, averaged over the batch; ``"example"``: for each batch entry too;
            ``"query"``: for each query too, which only measures that are means over queries have; its ``token`` is
            missing where the trace's tokens are not those of the call.
        real: bool or 0/1, B S, an ``attention_mask``: True = a real token, no padding. Without it those keys are real
            that some query may attend to.
        missing: whether a measure that is not defined for a call is NaN there, instead of an error.

    Returns:
        A pandas DataFrame with ``call``, ``step``, ``layer``, ``stack``, ``kind``, ``path``, ``head`` (and ``example``,
        ``query``, ``token``), and one column for each measure. Its ``attrs["units"]`` has their units.

    Raises:
        MeasureError: a measure is not defined for a call, and not ``missing``; or the trace has no calls.
        FieldNotCaptured: the trace lacks a field; names the measure, the call and the ``capture=`` that keeps it.
        SelectionError: an unknown measure or ``by``.
    """
    import pandas as pd

    chosen = resolve(measures)
    if by not in BY:
        raise SelectionError(f"by={by!r}: expected one of {', '.join(BY)}.")
    frames = [pd.DataFrame(columns(view, readings(view, chosen, missing), by)) for view in views(trace, real)]
    table = pd.concat(frames, ignore_index=True)
    table.attrs["units"] = {m.key: m.unit for m in chosen}
    return table


def readings(
    view: View, measures: Sequence[Measure], missing: bool = False, why: dict[str, str] | None = None
) -> dict[str, Reading | None]:
    """Each measure of one call by its key; None where it is not defined and may be missing.

    Args:
        view: the call.
        measures: which ones.
        missing: whether a measure may be missing.
        why: gets the reason for each that is.

    Raises:
        HookattnError: see :func:`measure`.
    """
    reasons = {} if why is None else why
    found: dict[str, Reading | None] = dict.fromkeys(m.key for m in measures)
    defined = []
    for m in measures:
        problem = m.problem(view) if missing else None
        if problem is None:
            defined.append(m)
        else:
            reasons.setdefault(m.key, problem)
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


def columns(view: View, found: dict[str, Reading | None], by: str) -> dict[str, Any]:
    """The columns of a call's part of a table: where, which head, and each reading; see :func:`measure` for ``by``."""
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
        if view.trace.tokens is not None:
            made["token"] = [x for row in _tokens(view) for _ in range(h) for x in row]
    for key, reading in found.items():
        value = None if reading is None else _values(key, view, reading, by)
        made[key] = torch.full((n,), torch.nan).numpy() if value is None else value.flatten().double().cpu().numpy()
    return made


def _tokens(view: View) -> list[list[str | None]]:
    """B T: the token of each query; None where it is not known."""
    b, _, t, _ = view.shape
    found = sequences(view)
    if isinstance(found, str) or view.positions is None or view.lost:
        return [[None] * t] * b
    at = view.positions.expand(b, t).tolist()
    return [[row[i] if i < len(row) else None for i in places] for row, places in zip(found, at, strict=True)]


def _values(key: str, view: View, reading: Reading, by: str) -> Tensor:
    if by != "query":
        return reading.heads if by == "head" else reading.value
    if reading.rows is None:
        raise MeasureError(f"{key} of {view.where}: it is no mean over queries, so there is no value by query.")
    return reading.rows
