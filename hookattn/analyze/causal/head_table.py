"""Tables of heads that are of the kind that :func:`hookattn.analyze.report` returns, of numbers that were computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...traces import Trace
from ..call_view import View
from ..frame import call_columns, table_of

if TYPE_CHECKING:
    from pandas import DataFrame

AXES = {"head": ("head",), "example": ("example", "head"), "position": ("head", "position")}
"""What there is a row for, and the axes that the numbers of a call have then."""


@dataclass(frozen=True)
class Column:
    """One column of such a table.

    Attributes:
        name: of the column.
        unit: of its numbers.
        description: one sentence, for those who read the table.
        values: for each call of the trace its numbers, over the axes of :data:`AXES`; None: it is not defined there,
            which is NaN.
    """

    name: str
    unit: str
    description: str
    values: Sequence[Tensor | None]


def head_table(
    trace: Trace, columns: Sequence[Column], by: str = "head", notes: Mapping[str, Any] | None = None
) -> DataFrame:
    """A row for each call and head, and what else ``by`` says.

    Args:
        trace: whose calls they are; the numbers of its calls are those that a trace of the plain model has.
        columns: of which at least one is defined for some call; a call that has none is left out.
        by: a key of :data:`AXES`.
        notes: further ``attrs``.

    Returns:
        A pandas DataFrame with ``call``, ``step``, ``layer``, ``stack``, ``kind``, ``path``, the axes, and the columns
        in float64. ``attrs["units"]`` and ``attrs["descriptions"]`` are by their names.
    """
    import pandas as pd

    frames = []
    for i, call in enumerate(trace.calls):
        shapes = [x.shape for c in columns if (x := c.values[i]) is not None]
        if not shapes:
            continue
        shape = shapes[0]
        made: dict[str, Any] = call_columns(View(call, trace))
        places = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
        for name, place in zip(AXES[by], places, strict=True):
            if name == "head" and call.heads is not None:
                place = torch.tensor(call.heads)[place]
            made[name] = place.flatten().numpy()
        for column in columns:
            x = column.values[i]
            x = torch.full(shape, torch.nan) if x is None else x
            made[column.name] = x.detach().double().flatten().cpu().numpy()
        frames.append(table_of(made))
    table = pd.concat(frames, ignore_index=True)
    table.attrs["units"] = {c.name: c.unit for c in columns}
    table.attrs["descriptions"] = {c.name: c.description for c in columns}
    table.attrs.update(notes or {})
    return table
