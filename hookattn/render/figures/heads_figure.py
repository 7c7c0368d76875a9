"""Two columns of tokens, joined by lines as strong as the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Unpack

import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from numpy.typing import NDArray

from ... import checks
from ...calls.choose import part_of_one_call
from ...calls.part import Part, Where
from ...traces import TraceLike, as_trace
from ..palette import LINE, head_style
from ..values import SINKS, WEIGHTS, Array, DrawnValues, Flags, Sink, drawn_values
from .base import Heading, axes_at, empty_sheet, hide_frame, in_own_style, name_artist, text_at
from .fitting import Width, fitted, title_of, width_in_inches
from .ticks import font_size, label_width, short_labels, stride

_TALLEST = 9.5
_FAN, _NARROWEST = 2.2, 0.5
_LABELS = 0.25
"""The part of a narrow figure that the labels of one side may take."""
_NAME = 0.62
_FLOOR, _LINES = 0.01, 600
"""The least weight that has a line, and how many lines there are at the most where nobody says which."""
_POINTS = 0.5
"""Points for each pixel that a line of the viewer is thick."""
_ROW = 0.2
_NEGATIVE = (0, (0.6, 1.6))


@in_own_style
def heads(
    trace: TraceLike,
    *,
    least: float | None = None,
    field: Literal["weights", "applied"] = "weights",
    sink: Sink = "show",
    width: Width = None,
    title: str | bool = True,
    **where: Unpack[Where],
) -> Figure:
    """Queries on the left, keys on the right, and a line for each weight: as opaque as the weight is large, of 1 or of
    the largest of the head where that is more. Dotted lines are weights below 0.

    Heads have colours that every kind of colour vision tells apart, and after the eighth dashes as well; a head has its
    own, whichever others are drawn. In self-attention a query stands level with its own key. Where there are so many
    lines that none can be followed the strongest alone are drawn, and the figure says how much of the attention those
    are.

    Args:
        trace: in memory, loaded, or compact.
        least: weights below it, of those above 1 as a part of the largest, have no line; larger than 0. None: 0.01, or
            what leaves the strongest 600 lines.
        field: ``weights``, or ``applied``: what met the values, where the model changed them after the softmax.
        sink: ``drop`` leaves out the first key, ``renormalise`` also divides each row by what is left.
        width, title: as for :func:`hookattn.render.heatmap`.
        **where: what is drawn: :class:`hookattn.calls.part.Where`; ``queries=[7]`` shows where one token looks.

    Returns:
        A figure, with one collection of lines for each head.

    Raises:
        SelectionError: no call fits or several do, or an unknown head or position; ``least`` is not in (0, 1].
        FieldNotCaptured: the weights are not in the trace; names the ``capture=``.
        InputError: ``tokens`` of another length.
        RenderError: it can't be so narrow.
    """
    if least is not None:
        least = checks.number("least", least, "a weight above 0 and at most 1", lambda x: 0 < x <= 1)
    checks.word("field", field, WEIGHTS)
    checks.word("sink", sink, SINKS)
    wide = width_in_inches(width)
    part = part_of_one_call(as_trace(trace), "heads", **where)
    title = title_of(title, part.title)
    first = part.first_key if sink != "show" else None
    # One head at a time: what is kept of its matrix are its lines.
    each = (drawn_values(one, field, sink, first=first) for one in part.each_head())
    found = _found(each, least or _FLOOR)
    chosen = _strongest(found, least)
    return fitted(wide, lambda room: _draw(part, chosen, title, room))


class _Links(NamedTuple):
    """The lines of a head.

    Attributes:
        rows, columns: which of the drawn queries and keys each joins.
        sizes: their weights' magnitudes, as parts of the largest where that is above 1.
        below: which weights are below 0.
    """

    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    sizes: Array
    below: Flags

    def of(self, kept: Flags) -> _Links:
        """Those of them that are kept."""
        return _Links(self.rows[kept], self.columns[kept], self.sizes[kept], self.below[kept])


class _Found(NamedTuple):
    """What may be drawn.

    Attributes:
        rows, columns: which queries and keys.
        heads: the lines of each head.
        whole: the sum of all sizes.
        notes: what a reader has to know.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    heads: list[_Links]
    whole: float
    notes: tuple[str, ...]


def _found(heads: Iterable[DrawnValues], least: float) -> _Found:
    """All lines of at least this size: of weights that sum to 1 there are at most 1/least a row."""
    links, whole = [], 0.0
    for one in heads:
        weights = np.nan_to_num(np.ma.filled(one.data[0], 0.0))
        sizes = np.abs(weights)
        sizes = sizes / max(1.0, float(sizes.max(initial=0.0)))
        whole += float(sizes.sum())
        rows, columns = np.nonzero(sizes >= least)
        links.append(_Links(rows, columns, sizes[rows, columns], weights[rows, columns] < 0))
    return _Found(one.rows, one.columns, links, whole, one.notes)


def _strongest(found: _Found, least: float | None) -> _Found:
    """The lines that are drawn, and in the notes how much of the attention is not."""
    floor = _FLOOR if least is None else least
    there = np.sort(np.concatenate([links.sizes[links.sizes >= floor] for links in found.heads]))
    if least is None and len(there) > _LINES:
        # All of a size or none: which of equals are drawn would be chance.
        bound = there[-_LINES]
        more = there[there > bound]
        floor = float(bound if there[-_LINES - 1] < bound or not len(more) else more[0])
    heads = [links.of(links.sizes >= floor) for links in found.heads]
    drawn = sum(float(links.sizes.sum()) for links in heads)
    notes = found.notes
    if drawn < 0.99 * found.whole:
        notes = (*notes, f"lines from {floor:.2g} on, {drawn / found.whole:.0%} of the attention")
    return _Found(found.rows, found.columns, heads, found.whole, notes)


def _draw(part: Part, found: _Found, title: str, room: float | None) -> Figure:
    level = _levels(part, found.rows, found.columns)
    lowest, highest = min(map(min, level)), max(map(max, level))
    keys = [part.keys[j] for j in found.columns]
    slots = highest - lowest + 1
    row = min(_ROW, _TALLEST / slots)
    most = None if room is None else _LABELS * room
    queries, keys = (short_labels(labels, row, most) for labels in (part.row_labels, keys))
    left, right = label_width(queries, row), label_width(keys, row)
    fan = _FAN if room is None else max(_NARROWEST, room - left - right - 0.2)
    heading = Heading.of([part], title, found.notes).within(room)
    top = heading.height + 0.12
    each = max(1, int((left + fan + right) / _NAME))
    legend = -(-len(part.heads) // each)
    figure = empty_sheet(left + fan + right + 0.2, top + 0.16 * legend + 0.12 + slots * row + 0.1)
    heading.draw(figure)
    _legend(figure, part, 0.05, top - 0.04, each)
    top += 0.16 * legend + 0.12
    axes = axes_at(figure, 0.1 + left, top, fan, slots * row)
    hide_frame(axes)
    axes.set(xlim=(0, 1), ylim=(highest + 0.5, lowest - 0.5))
    for name, x, align in (("query", 0.1 + left, "right"), ("key", 0.1 + left + fan, "left")):
        text_at(figure, x, top - 0.14, name, fontsize=6.5, ha=align, fontstyle="italic")
    for x, align, at, labels in (
        (-0.03 / fan, "right", level.queries, queries),
        (1 + 0.03 / fan, "left", level.keys, keys),
    ):
        apart = row * (at[1] - at[0] if len(at) > 1 else 1.0)
        for i in range(0, len(labels), stride(apart)):
            axes.text(x, at[i], labels[i], ha=align, va="center", fontsize=font_size(row), clip_on=False)
    for head, links in zip(part.heads, found.heads, strict=True):
        lines = _lines(head, links, level)
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


def _lines(head: int, links: _Links, level: _Levels) -> PathCollection:
    """The lines of a head, as opaque and as thick as its T S weights are large, and bent as in the viewer."""
    colour, dashes = head_style(head)
    bend = LINE["bend"]
    paths = [
        Path([(0, a), (bend, a), (1 - bend, b), (1, b)], [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
        for a, b in ((level.queries[i], level.keys[j]) for i, j in zip(links.rows, links.columns, strict=True))
    ]
    strength = np.minimum(1.0, links.sizes)
    tones = [to_rgba(colour, max(LINE["faintest"], float(s))) for s in strength]
    widths = _POINTS * (LINE["thinnest"] + (LINE["thickest"] - LINE["thinnest"]) * strength)
    style: Any = (0, dashes) if dashes else "solid"
    styles = [_NEGATIVE if negative else style for negative in links.below] if links.below.any() else [style]
    return PathCollection(
        paths, facecolors="none", edgecolors=tones, linewidths=widths, linestyles=styles, capstyle="butt"
    )


def _legend(figure: Figure, part: Part, x: float, y: float, each: int) -> None:
    """A stroke and a number for each head, so many in a line."""
    w, h = figure.get_size_inches()
    for n, head in enumerate(part.heads):
        colour, dashes = head_style(head)
        line, column = divmod(n, each)
        at, level = x + _NAME * column, y + 0.16 * line
        stroke = Line2D([at / w, (at + 0.16) / w], [1 - level / h] * 2, color=colour, linewidth=1.6)
        stroke.set_linestyle((0, dashes) if dashes else "solid")
        figure.add_artist(stroke)
        text_at(figure, at + 0.2, level, f"head {head}", fontsize=6.0, va="center")
