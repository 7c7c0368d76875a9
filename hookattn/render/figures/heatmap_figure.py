"""Queries by keys, one panel a head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ... import checks
from ...calls.choose import part_of_one_call
from ...calls.part import Part, Where
from ...traces import TraceLike, as_trace
from ..palette import FAINT, MAY
from ..values import WEIGHTS, DrawnValues, Field, Scale, Sink, check_options, drawn_values
from .base import Heading, axes_at, empty_sheet, in_own_style, name_artist, text_at
from .colours import ColourScale, colour_scale, show_masked
from .fitting import Width, fitted, title_of, width_in_inches
from .ticks import label_axis, label_depth, label_width

WIDEST = 9.0
"""Inches. On paper of seven, labels of six points are still legible then."""
_CELL = 0.27
# Above so many cells a vector file of one rectangle each takes viewers seconds; they become pixels.
_VECTOR = 1 << 14
_MOST = 1024
_GAP, _TITLE = 0.16, 0.2
_AXIS, _LEGEND = 0.2, 0.62
"""Inches that the name of an axis takes, and the colour bar with its numbers."""
_LARGEST_CELL, _LEAST_PANEL = 0.45, 0.9


@in_own_style
def heatmap(
    trace: TraceLike,
    *,
    field: Field = "weights",
    scale: Scale = "linear",
    sink: Sink = "show",
    columns: int | None = None,
    width: Width = None,
    title: str | bool = True,
    **where: Unpack[Where],
) -> Figure:
    """One call as heatmaps, queries down and keys across, a panel for each head.

    Masked entries are hatched, and are not 0. Weights are coloured from 0 to where most rows of more than a few keys
    end, as in the viewer, and the colour bar says ``≥`` where any is larger; scores, and weights below 0, symmetrically
    about 0. More than 1,024 queries or keys are pooled, each pixel the largest of its block, which the figure says.

    Args:
        trace: in memory, loaded, or compact.
        field: ``weights``, ``applied`` (what met the values, where the model changed them), ``scores`` or ``mask``.
        scale: ``log`` colours weights from 1e-4 to the largest.
        sink: ``drop`` leaves out the first key, ``renormalise`` also divides each row by what is left.
        columns: panels side by side.
        width: inches that the figure is wide, ``column`` (3.3) or ``page`` (7); None: as wide as it is.
        title: the line above; False: none.
        **where: what is drawn: :class:`hookattn.calls.part.Where`.

    Returns:
        A figure; ``figure.savefig("x.svg")``, ``.pdf``, ``.png``. Each panel's mesh holds the exact values.

    Raises:
        SelectionError: no call fits or several do, an unknown head or position, or arguments that don't go together.
        RenderError: it can't be so narrow.
        FieldNotCaptured: the field is not in the trace; names the ``capture=``.
        InputError: ``tokens`` of another length.
    """
    check_options(field, scale, sink)
    columns = None if columns is None else checks.whole("columns", columns, 1)
    wide = width_in_inches(width)
    part = part_of_one_call(as_trace(trace), "heatmap", **where)
    usual = part.title if len(part.heads) > 1 else f"{part.title}, head {part.heads[0]}"
    title = title_of(title, usual)
    found = drawn_values(part, field, sink, most=_MOST)
    return fitted(wide, lambda room: _panels(part, found, field, scale, columns, title, room))


def _panels(
    part: Part, found: DrawnValues, field: str, scale: str, columns: int | None, title: str, room: float | None
) -> Figure:
    h, t, s, block = len(part.heads), len(found.rows), len(found.columns), found.block
    notes = [*found.notes, *([f"each pixel is the largest of {block} × {block} entries"] if block > 1 else [])]
    down, across = [part.queries[i] for i in found.rows], [part.keys[j] for j in found.columns]
    lines_of, columns_of = _grid(h, columns, room)
    heading = Heading.of([part], title, notes).within(room)
    cell = _cell(t, s, columns_of, down, room)
    width, height = max(s * cell, 0.4), max(t * cell, 0.12)
    left, below = label_width(down, height / t) + _AXIS, label_depth(across, width / s) + _AXIS
    named = _TITLE * (h > 1)
    top, step = heading.height, height + named + _GAP
    figure = empty_sheet(left + columns_of * (width + _GAP) + _LEGEND, top + lines_of * step + below + 0.1)
    heading.draw(figure)
    mapped = colour_scale(found.end, found.largest, field, scale, found.negative and field in WEIGHTS)
    for n, head in enumerate(part.heads):
        row, column = divmod(n, columns_of)
        axes = axes_at(figure, left + column * (width + _GAP), top + row * step + named, width, height)
        if h > 1:
            axes.set_title(f"head {head}", pad=3)
        mesh = draw_mesh(axes, found.data[n], block, mapped)
        name_artist(mesh, f"head-{head}")
        last = n + columns_of >= h
        label_axis(axes, "y", down, height / t, shown=column == 0)
        label_axis(axes, "x", across, width / s, shown=last)
        if column == 0:
            axes.set_ylabel("query", labelpad=3)
        if last:
            axes.set_xlabel("key", labelpad=3)
    draw_legend(figure, left + columns_of * (width + _GAP), top + named + 0.12, [mapped], field, found.masked)
    return figure


def _grid(panels: int, columns: int | None, room: float | None) -> tuple[int, int]:
    """Lines and columns of panels: about as many of one as of the other, and fewer columns where they would be tiny."""
    most = 4 if room is None else max(1, int((room - 1.4) / _LEAST_PANEL))
    columns = min(panels, columns or min(most, math.ceil(math.sqrt(panels))))
    return math.ceil(panels / columns), columns


def _cell(t: int, s: int, columns: int, down: Sequence[str], room: float | None) -> float:
    """Inches of a cell: as large as there is room for, and not as large as to be silly."""
    if room is None:
        return min(_CELL, (WIDEST - 1.6 - _GAP * (columns - 1)) / (columns * max(s, 1)), 7.4 / max(t, 1))
    largest = min(_LARGEST_CELL, 7.4 / max(t, 1))
    cell = largest
    for _ in range(4):  # labels are as wide as their rows are high allow
        used = label_width(down, cell) + _AXIS + _LEGEND + _GAP * columns
        cell = min(largest, max(0.02, room - used) / (columns * max(s, 1)))
    return cell


def draw_mesh(axes: Axes, data: Any, block: int, mapped: ColourScale) -> QuadMesh:
    """A matrix as cells, the first row on top; vectors where they are few, pixels where they are many.

    Args:
        axes: where.
        data: rows columns, masked where hidden.
        block: how many positions each cell takes.
        mapped: its colours.
    """
    t, s = data.shape
    many = data.size > _VECTOR
    edges = [[i * block - 0.5 for i in range(n + 1)] for n in (s, t)]
    look = {"linewidth": 0, "rasterized": True} if many else {"edgecolors": "face", "linewidth": 0.15}
    mesh = axes.pcolormesh(*edges, data, cmap=mapped.map, norm=mapped.norm, **look)
    axes.invert_yaxis()
    show_masked(axes.patch)
    return mesh


def draw_legend(figure: Figure, x: float, y: float, scales: Sequence[ColourScale], field: str, masked: bool) -> None:
    """The colour bar, or the colour of what may be attended to; and what the hatching means.

    Args:
        figure: where.
        x, y: its upper left corner in inches.
        scales: of the pictures; where they differ the bar has a word in place of the number at its end.
        field: what is drawn.
        masked: whether anything is hatched.
    """
    mapped = scales[0]
    if field == "mask":
        axes_at(figure, x, y, 0.11, 0.11).set(xticks=[], yticks=[], facecolor=MAY)
        text_at(figure, x + 0.16, y - 0.015, "may attend", fontsize=6.5, color=FAINT)
        y += 0.2
    else:
        axes = axes_at(figure, x, y, 0.09, 1.0)
        bar = figure.colorbar(ScalarMappable(mapped.norm, mapped.map), cax=axes)
        bar.outline.set_linewidth(0.4)
        at, told = _bar_ticks(scales)
        bar.set_ticks(at, labels=told)
        bar.ax.tick_params(labelsize=6.0, length=2)
        bar.ax.tick_params(which="minor", length=0)
        bar.ax.set_title(
            {"weights": "weight", "applied": "applied", "scores": "score"}[field], fontsize=6.5, loc="left", pad=5
        )
        y += 1.15
    if masked:
        box = axes_at(figure, x, y, 0.11, 0.11)
        box.set(xticks=[], yticks=[])
        show_masked(box.patch)
        text_at(figure, x + 0.16, y - 0.015, "masked", fontsize=6.5, color=FAINT)


def _bar_ticks(scales: Sequence[ColourScale]) -> tuple[list[float], list[str]]:
    """Numbers beside a colour bar: round ones, its two ends, and where it clips."""
    mapped = scales[0]
    ends = {(one.norm.vmin, one.norm.vmax) for one in scales}
    low, high = float(mapped.norm.vmin or 0.0), float(mapped.norm.vmax or 1.0)
    if len(ends) > 1:
        own = ("≥ " if any(one.clipped for one in scales) else "") + "own end"
        signed = low < 0
        return ([low, 0, high] if signed else [low, high]), [*(["−"] * signed), "0" if low <= 0 else f"≤ {low:g}", own]
    if isinstance(mapped.norm, LogNorm):
        at = [10.0**k for k in range(round(math.log10(low)), math.floor(math.log10(high) - 0.3) + 1)]
        return [*at, high], [f"≤ {low:g}", *(f"{x:g}" for x in at[1:]), f"{high:.2g}"]
    # Beside an end there is no room for another number.
    at = [x for x in MaxNLocator(4).tick_values(low, high) if low + (high - low) / 9 < x < high - (high - low) / 9]
    clipped = any(one.clipped for one in scales)
    return [low, *at, high], [f"{low:.3g}", *(f"{x:g}" for x in at), ("≥ " if clipped else "") + f"{high:.3g}"]
