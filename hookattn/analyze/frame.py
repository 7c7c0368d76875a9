"""Tables that have one row for each place in a tensor, and the calls that they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..calls.call import Call
from ..errors import MeasureError
from ..printable import printable
from ..traces import as_trace
from .call_view import View, as_real

if TYPE_CHECKING:
    from pandas import DataFrame

    from ..traces import TraceLike


def views(trace: TraceLike, real: Any = None) -> Iterator[View]:
    """Each call of a trace, one at a time: a view holds what was read and derived, and goes when the next one comes.

    Args:
        trace: the trace.
        real: B S, see :class:`View`.

    Raises:
        MeasureError: there are none, or ``real`` says of no token whether it is one.
        InputError, TraceFileError: ``trace`` is none; see :func:`hookattn.traces.as_trace`.
    """
    trace, real = as_trace(trace), as_real(real)
    if not trace.calls:
        raise MeasureError("the trace has no calls to measure.")
    for call in trace.calls:
        view = View(call, trace, real)
        if real is not None:
            _ = view.keys  # raises where it does not fit, for those as well that look at no padding
        yield view


def views_of_heads(trace: TraceLike, real: Any = None) -> Iterator[View]:
    """The heads of each call in their order, a block of them at a time, for tables that look at each head alone.

    Args, Raises: as :func:`views`.
    """
    for view in views(trace, real):
        yield from view.parts()


def call_columns(view: View) -> dict[str, Any]:
    """The columns that say which call a row is of."""
    return place_columns(view.call)


def place_columns(call: Call) -> dict[str, Any]:
    """Likewise, of a call itself."""
    return {
        "call": call.index,
        "step": call.step,
        "layer": call.site.layer,
        "stack": call.site.stack,
        "kind": call.site.kind,
        "path": call.site.path,
    }


def table_of(columns: Mapping[str, Any]) -> DataFrame:
    """A table of columns, whose text is printable, and which writes text as text for spreadsheets.

    Args:
        columns: name → a value for all rows, or one for each.
    """
    from .spreadsheet import Table

    return Table({printable(name): _printable_column(values) for name, values in columns.items()})


def _printable_column(values: Any) -> Any:
    if isinstance(values, str):
        return printable(values)
    own = values.tolist() if getattr(values, "dtype", None) is not None and values.dtype.kind in "OU" else values
    if not isinstance(own, (list, tuple)):
        return values  # numbers
    seen: dict[str, str] = {}  # few words, many times

    def written(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in seen:
            seen[value] = printable(value)
        return seen[value]

    return [written(value) for value in own]


def long_table(view: View, axes: Mapping[str, Sequence[Any]], values: Mapping[str, Tensor]) -> DataFrame:
    """One row for each place: the columns of the call, a label for each axis, the values.

    Args:
        view: the call.
        axes: name → the labels along it, as many as the tensors have there.
        values: name → a tensor over all axes.
    """
    import numpy as np

    places = np.indices([len(labels) for labels in axes.values()]).reshape(len(axes), -1)
    columns = call_columns(view)
    for (name, labels), place in zip(axes.items(), places, strict=True):
        columns[name] = np.asarray(labels)[place]
    for name, value in values.items():
        columns[name] = value.detach().flatten().cpu().numpy()
    return table_of(columns)


def ranked_table(frames: Sequence[DataFrame], column: str) -> DataFrame:
    """Tables in one, the largest of a column first; what is equal stays in its order, and NaN is last."""
    import pandas as pd

    table = pd.concat(list(frames), ignore_index=True)
    return table.sort_values(column, ascending=False, ignore_index=True, kind="stable")
