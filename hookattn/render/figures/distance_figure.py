"""How far heads look: mean attention at each distance from the query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ... import checks
from ...calls.choose import parts_of_one_stack
from ...calls.part import Part, Where
from ...traces import TraceLike, as_trace
from ..by_distance import highest, lowest, mean_by_distance, notes_of
from ..palette import head_style
from ..values import FLOOR, SCALES, Array, Scale
from .base import Heading, axes_at, empty_sheet, in_own_style, name_artist, text_at
from .fitting import Width, fitted, title_of, width_in_inches

_WIDTH, _HEIGHT, _GAP = 1.9, 1.15, 0.34
_LEFT, _NAMES, _LEAST = 0.5, 0.7, 1.3
"""Inches that the numbers on the left take, and the names of heads on the right; a panel takes at the least."""


@in_own_style
def distance(
    trace: TraceLike,
    *,
    scale: Scale = "linear",
    width: Width = None,
    title: str | bool = True,
    **where: Unpack[Where],
) -> Figure:
    """Mean weight against the distance from the query back to the key, a panel for each layer and a line for each head.

    The mean at distance d is over all drawn queries i that have a key at i − d which the mask allows: 1 at d = 1 is a
    head that always attends to the token before. Negative distances are keys behind the query.

    Args:
        trace: in memory, loaded, or compact; one stack, kind and step of it.
        scale: of the weights.
        width, title: as for :func:`hookattn.render.heatmap`.
        **where: what is drawn: :class:`hookattn.calls.part.Where`.

    Returns:
        A figure with a line for each layer and head, named ``layer-N-head-M``.

    Raises:
        SelectionError: nothing fits, several stacks, kinds or steps do, or there are no distances (cross-attention).
        FieldNotCaptured: the weights are not in the trace; names the ``capture=``.
        RenderError: it can't be so narrow.
    """
    checks.word("scale", scale, SCALES)
    wide = width_in_inches(width)
    parts = parts_of_one_stack(as_trace(trace), "distance", **where)
    title = title_of(title, parts[0].stack)
    curves = [mean_by_distance(part) for part in parts]
    return fitted(wide, lambda room: _draw(parts, curves, scale, title, room))


def _draw(
    parts: Sequence[Part], curves: Sequence[tuple[Array, Array]], scale: str, title: str, room: float | None
) -> Figure:
    columns = min(4, math.ceil(math.sqrt(len(parts))))
    across = _WIDTH
    if room is not None:
        columns = min(columns, max(1, int((room - 1.2) / _LEAST)))
        across = max(0.6, (room - _LEFT - _NAMES) / columns - _GAP)
    rows = math.ceil(len(parts) / columns)
    heading = Heading.of(parts, title, notes_of(parts)).within(room)
    numbers = sorted({head for part in parts for head in part.heads})
    top = heading.height + 0.15
    figure = empty_sheet(_LEFT + columns * (across + _GAP) + _NAMES, top + rows * (_HEIGHT + _GAP + 0.1) + 0.3)
    heading.draw(figure)
    top_value = highest(curves)
    for n, (part, (at, means)) in enumerate(zip(parts, curves, strict=True)):
        row, column = divmod(n, columns)
        axes = axes_at(figure, _LEFT + column * (across + _GAP), top + row * (_HEIGHT + _GAP + 0.1), across, _HEIGHT)
        _draw_lines(axes, part, at, means)
        axes.set(
            yscale=scale,
            ylim=(FLOOR if scale == "log" else lowest(curves, top_value), top_value),
            xlim=(at[0] - 0.5, at[-1] + 0.5),
        )
        # The scale of an axis brings ticks of its own, so that these are set after it.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator(6 if across > 1.5 else 3, integer=True))
        if column == 0:
            axes.set_ylabel("mean weight")
        if n + columns >= len(parts):
            axes.set_xlabel("distance back to the key")
    _draw_legend(figure, _LEFT + columns * (across + _GAP) - _GAP + 0.1, top, numbers)
    return figure


def _draw_lines(axes: Axes, part: Part, at: Array, means: Array) -> None:
    """One layer: a line for each head, in the style that the head has in every panel."""
    axes.set_title(part.title.removeprefix(part.stack).strip(), pad=3)
    for head, mean in zip(part.heads, means, strict=True):
        colour, dashes = head_style(head)
        style = (0, dashes) if dashes else "solid"
        line = axes.plot(at, mean, color=colour, linestyle=style, linewidth=0.9, label=f"head {head}")[0]
        name_artist(line, f"layer-{part.call.site.layer}-head-{head}")
    axes.grid(True, axis="y")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_legend(figure: Figure, x: float, y: float, numbers: Sequence[int]) -> None:
    """A stroke and a number for each head, from (x, y) in inches, as many below each other as there is room for."""
    w, h = figure.get_size_inches()
    each = max(6, int((h - y - 0.1) / 0.13))
    for n, head in enumerate(numbers):
        column, line = divmod(n, each)
        at, level = x + 0.65 * column, y + 0.06 + 0.13 * line
        colour, dashes = head_style(head)
        stroke = Line2D([at / w, (at + 0.2) / w], [1 - level / h] * 2, color=colour, linewidth=0.9)
        stroke.set_linestyle((0, dashes) if dashes else "solid")
        figure.add_artist(stroke)
        text_at(figure, at + 0.24, level, f"head {head}", fontsize=6.0, va="center")
