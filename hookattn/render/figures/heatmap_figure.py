"""Queries by keys, one panel a head."""

from __future__ import annotations

import math
from typing import Any, Unpack

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ... import checks
from ...calls.choose import part_of_one_call
from ...calls.part import Part, Where
from ...traces import TraceLike, as_trace
from ..palette import FAINT, MAY
from ..values import WEIGHTS, DrawnValues, Field, Scale, Sink, check_options, drawn_values
from .base import Heading, axes_at, empty_sheet, in_own_style, name_artist, text_at
from .colours import ColourScale, colour_scale, show_masked
from .ticks import label_axis, label_depth, label_width

WIDEST = 9.0
"""Inches. On paper of seven, labels of six points are still legible then."""
_CELL = 0.27
# Above so many cells a vector file of one rectangle each takes viewers seconds; they become pixels.
_VECTOR = 1 << 14
_MOST = 1024
_GAP, _TITLE = 0.16, 0.2


@in_own_style
def heatmap(
    trace: TraceLike,
    *,
    field: Field = "weights",
    scale: Scale = "linear",
    sink: Sink = "show",
    columns: int | None = None,
    **where: Unpack[Where],
) -> Figure:
    """One call as heatmaps, queries down and keys across, a panel for each head.

    Masked entries are hatched, and are not 0. Weights are coloured from 0 to 1 in every panel (to the largest, where a
    normalizer makes more than 1), scores, and weights below 0, symmetrically about 0. More than 1,024 queries or keys
    are pooled, each pixel the largest of its block, which the figure says.

    Args:
        trace: in memory, loaded, or compact.
        field: ``weights``, ``applied`` (what met the values, where the model changed them), ``scores`` or ``mask``.
        scale: ``log`` colours weights from 1e-4 to 1.
        sink: ``drop`` leaves out the first key, ``renormalise`` also divides each row by what is left.
        columns: panels side by side.
        **where: what is drawn: :class:`hookattn.calls.part.Where`.

    Returns:
        A figure; ``figure.savefig("x.svg")``, ``.pdf``, ``.png``. Each panel's mesh holds the exact values.

    Raises:
        SelectionError: no call fits or several do, an unknown head or position, or arguments that don't go together.
        FieldNotCaptured: the field is not in the trace; names the ``capture=``.
        InputError: ``tokens`` of another length.
    """
    check_options(field, scale, sink)
    columns = None if columns is None else checks.whole("columns", columns, 1)
    part = part_of_one_call(as_trace(trace), "heatmap", **where)
    found = drawn_values(part, field, sink, most=_MOST)
    return _panels(part, found, field, scale, columns)


def _panels(part: Part, found: DrawnValues, field: str, scale: str, columns: int | None) -> Figure:
    h, t, s, block = len(part.heads), len(found.rows), len(found.columns), found.block
    notes = [*found.notes, *([f"each pixel is the largest of {block} × {block} entries"] if block > 1 else [])]
    down, across = [part.queries[i] for i in found.rows], [part.keys[j] for j in found.columns]
    columns = min(h, columns or min(4, math.ceil(math.sqrt(h))))
    lines = math.ceil(h / columns)
    cell = min(_CELL, (WIDEST - 1.6 - _GAP * (columns - 1)) / (columns * max(s, 1)), 7.4 / max(t, 1))
    width, height = max(s * cell, 0.5), max(t * cell, 0.12)
    left, below = label_width(down, height / t) + 0.2, label_depth(across, width / s) + 0.2
    heading = Heading.of([part], part.title if h > 1 else f"{part.title}, head {part.heads[0]}", notes)
    title = _TITLE * (h > 1)
    top, step = heading.height, height + title + _GAP
    figure = empty_sheet(left + columns * (width + _GAP) + 0.9, top + lines * step + below + 0.1)
    heading.draw(figure)
    mapped = colour_scale(found.largest, field, scale, found.negative and field in WEIGHTS)
    for n, head in enumerate(part.heads):
        row, column = divmod(n, columns)
        axes = axes_at(figure, left + column * (width + _GAP), top + row * step + title, width, height)
        if h > 1:
            axes.set_title(f"head {head}", pad=3)
        mesh = draw_mesh(axes, found.data[n], block, mapped)
        name_artist(mesh, f"head-{head}")
        last = n + columns >= h
        label_axis(axes, "y", down, height / t, shown=column == 0)
        label_axis(axes, "x", across, width / s, shown=last)
        if column == 0:
            axes.set_ylabel("query", labelpad=3)
        if last:
            axes.set_xlabel("key", labelpad=3)
    draw_legend(figure, left + columns * (width + _GAP), top + title + 0.12, mapped, field, scale, found.masked)
    return figure


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


def draw_legend(figure: Figure, x: float, y: float, mapped: ColourScale, field: str, scale: str, masked: bool) -> None:
    """The colour bar, or the colour of what may be attended to; and what the hatching means."""
    if field == "mask":
        axes_at(figure, x, y, 0.11, 0.11).set(xticks=[], yticks=[], facecolor=MAY)
        text_at(figure, x + 0.16, y - 0.015, "may attend", fontsize=6.5, color=FAINT)
        y += 0.2
    else:
        axes = axes_at(figure, x, y, 0.09, 1.0)
        extend = "min" if isinstance(mapped.norm, LogNorm) else "neither"
        bar = figure.colorbar(ScalarMappable(mapped.norm, mapped.map), cax=axes, extend=extend, format="{x:g}")
        bar.outline.set_linewidth(0.4)
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
