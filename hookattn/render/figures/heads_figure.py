"""Two columns of tokens, joined by lines as strong as the weights."""

from __future__ import annotations

import itertools
from typing import Any, Literal, NamedTuple, Unpack

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ... import checks
from ...calls.choose import part_of_one_call
from ...calls.part import Part, Where
from ...tokens.display import shortened
from ...traces import TraceLike, as_trace
from ..palette import head_style
from ..values import SINKS, WEIGHTS, Array, Sink, drawn_values, first_key
from .base import Heading, axes_at, empty_sheet, hide_frame, in_own_style, name_artist, text_at
from .ticks import LONGEST, font_size, label_width, stride

_TALLEST = 9.5
_FAN = 2.2
_ROW = 0.2
_NEGATIVE = (0, (0.6, 1.6))


@in_own_style
def heads(
    trace: TraceLike,
    *,
    least: float = 0.01,
    field: Literal["weights", "applied"] = "weights",
    sink: Sink = "show",
    **where: Unpack[Where],
) -> Figure:
    """Queries on the left, keys on the right, and a line for each weight: as opaque as the weight is large, of 1 or of
    the largest of the head where that is more. Dotted lines are weights below 0.

    Heads have colours that every kind of colour vision tells apart, and after the eighth dashes as well. In
    self-attention a query stands level with its own key.

    Args:
        trace: in memory, loaded, or compact.
        least: weights below it, of those above 1 as a part of the largest, have no line; larger than 0.
        field: ``weights``, or ``applied``: what met the values, where the model changed them after the softmax.
        sink: ``drop`` leaves out the first key, ``renormalise`` also divides each row by what is left.
        **where: what is drawn: :class:`hookattn.calls.part.Where`; ``queries=[7]`` shows where one token looks.

    Returns:
        A figure, with one collection of lines for each head.

    Raises:
        SelectionError: no call fits or several do, or an unknown head or position; ``least`` is not in (0, 1].
        FieldNotCaptured: the weights are not in the trace; names the ``capture=``.
        InputError: ``tokens`` of another length.
    """
    least = checks.number("least", least, "a weight above 0 and at most 1", lambda x: 0 < x <= 1)
    checks.word("field", field, WEIGHTS)
    checks.word("sink", sink, SINKS)
    part = part_of_one_call(as_trace(trace), "heads", **where)
    first = first_key(part) if sink != "show" else None
    drawn = (drawn_values(one, field, sink, first=first) for one in part.each_head())
    found = next(drawn)
    level = _levels(part, found.rows, found.columns)
    lowest, highest = min(map(min, level)), max(map(max, level))
    keys = [part.keys[j] for j in found.columns]
    slots = highest - lowest + 1
    row = min(_ROW, _TALLEST / slots)
    left, right = label_width(part.row_labels, row), label_width(keys, row)
    heading = Heading.of([part], part.title, found.notes)
    top = heading.height + 0.12
    legend = -(-len(part.heads) // max(1, int((left + _FAN + right) / 0.62)))
    figure = empty_sheet(left + _FAN + right + 0.2, top + 0.16 * legend + 0.12 + slots * row + 0.1)
    heading.draw(figure)
    _legend(figure, part, 0.05, top - 0.04, left + _FAN + right)
    top += 0.16 * legend + 0.12
    axes = axes_at(figure, 0.1 + left, top, _FAN, slots * row)
    hide_frame(axes)
    axes.set(xlim=(0, 1), ylim=(highest + 0.5, lowest - 0.5))
    for name, x, align in (("query", 0.1 + left, "right"), ("key", 0.1 + left + _FAN, "left")):
        text_at(figure, x, top - 0.14, name, fontsize=6.5, ha=align, fontstyle="italic")
    for x, align, at, labels in (
        (-0.02, "right", level.queries, part.row_labels),
        (1.02, "left", level.keys, keys),
    ):
        for i in range(0, len(labels), stride(row) if len(labels) == slots else 1):
            label = shortened(labels[i], LONGEST)
            axes.text(x, at[i], label, ha=align, va="center", fontsize=font_size(row), clip_on=False)
    for n, (head, own) in enumerate(zip(part.heads, itertools.chain([found], drawn), strict=True)):
        lines = _lines(n, np.ma.filled(own.data[0], 0.0), level, least)
        name_artist(lines, f"head-{head}")
        axes.add_collection(lines)
    return figure


class _Levels(NamedTuple):
    """The height of each drawn query, and of each drawn key, in rows from the first token."""

    queries: list[float]
    keys: list[float]


def _levels(part: Part, rows: tuple[int, ...], columns: tuple[int, ...]) -> _Levels:
    """Places in the sequence; where there is no common one, the shorter column is stretched to the longer."""
    if part.places is not None:
        return _Levels([float(part.places[i]) for i in rows], [float(j) for j in columns])
    most = max(len(rows), len(columns))
    return _Levels(*([(i + 0.5) * most / n - 0.5 for i in range(n)] for n in (len(rows), len(columns))))


def _lines(n: int, weights: Array, level: _Levels, least: float) -> LineCollection:
    """The lines of the n-th drawn head, as opaque as its T S weights are large."""
    sizes = np.abs(weights) / max(1.0, float(np.nanmax(np.abs(weights), initial=0.0)))
    rows, columns = np.nonzero(sizes >= least)
    colour, dashes = head_style(n)
    lines = [((0, level.queries[i]), (1, level.keys[j])) for i, j in zip(rows, columns, strict=True)]
    tones = [to_rgba(colour, min(1.0, float(w))) for w in sizes[rows, columns]]
    style: Any = (0, dashes) if dashes else "solid"
    below = weights[rows, columns] < 0
    styles = [_NEGATIVE if negative else style for negative in below] if below.any() else [style]
    return LineCollection(lines, colors=tones, linewidths=1.1, linestyles=styles, capstyle="butt")


def _legend(figure: Figure, part: Part, x: float, y: float, width: float) -> None:
    """A stroke and a number for each head."""
    each = max(1, int(width / 0.62))
    w, h = figure.get_size_inches()
    for n, head in enumerate(part.heads):
        colour, dashes = head_style(n)
        line, column = divmod(n, each)
        at, level = x + 0.62 * column, y + 0.16 * line
        stroke = Line2D([at / w, (at + 0.16) / w], [1 - level / h] * 2, color=colour, linewidth=1.6)
        stroke.set_linestyle((0, dashes) if dashes else "solid")
        figure.add_artist(stroke)
        text_at(figure, at + 0.2, level, f"head {head}", fontsize=6.0, va="center")
