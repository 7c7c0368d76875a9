"""How far heads look: mean attention at each distance from the query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ... import checks
from ...calls.choose import parts_of_one_stack
from ...calls.part import Part, Where
from ...traces import TraceLike, as_trace
from ..by_distance import highest, lowest, mean_by_distance, notes_of
from ..palette import head_style
from ..values import FLOOR, SCALES, Array, Scale
from .base import Heading, axes_at, empty_sheet, in_own_style, name_artist

_WIDTH, _HEIGHT, _GAP = 1.9, 1.15, 0.34


@in_own_style
def distance(trace: TraceLike, *, scale: Scale = "linear", **where: Unpack[Where]) -> Figure:
    """Mean weight against the distance from the query back to the key, a panel for each layer and a line for each head.

    The mean at distance d is over all drawn queries i that have a key at i − d which the mask allows: 1 at d = 1 is a
    head that always attends to the token before. Negative distances are keys behind the query.

    Args:
        trace: in memory, loaded, or compact; one stack, kind and step of it.
        scale: of the weights.
        **where: what is drawn: :class:`hookattn.calls.part.Where`.

    Returns:
        A figure with a line for each layer and head, named ``layer-N-head-M``.

    Raises:
        SelectionError: nothing fits, several stacks, kinds or steps do, or there are no distances (cross-attention).
        FieldNotCaptured: the weights are not in the trace; names the ``capture=``.
    """
    checks.word("scale", scale, SCALES)
    parts = parts_of_one_stack(as_trace(trace), "distance", **where)
    columns = min(4, math.ceil(math.sqrt(len(parts))))
    rows = math.ceil(len(parts) / columns)
    heading = Heading.of(parts, parts[0].stack, notes_of(parts))
    numbers = sorted({head for part in parts for head in part.heads})
    top = heading.height + 0.15
    figure = empty_sheet(0.55 + columns * (_WIDTH + _GAP) + 0.75, top + rows * (_HEIGHT + _GAP + 0.1) + 0.3)
    heading.draw(figure)
    curves = [mean_by_distance(part) for part in parts]
    top_value = highest(curves)
    for n, (part, (at, means)) in enumerate(zip(parts, curves, strict=True)):
        row, column = divmod(n, columns)
        axes = axes_at(figure, 0.5 + column * (_WIDTH + _GAP), top + row * (_HEIGHT + _GAP + 0.1), _WIDTH, _HEIGHT)
        _draw_lines(axes, part, numbers, at, means)
        axes.set(
            yscale=scale,
            ylim=(FLOOR if scale == "log" else lowest(curves, top_value), top_value),
            xlim=(at[0] - 0.5, at[-1] + 0.5),
        )
        # The scale of an axis brings ticks of its own, so that these are set after it.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if column == 0:
            axes.set_ylabel("mean weight")
        if n + columns >= len(parts):
            axes.set_xlabel("distance back to the key")
    _draw_legend(figure, 0.62 + columns * (_WIDTH + _GAP) - _GAP, top, numbers)
    return figure


def _draw_lines(axes: Axes, part: Part, numbers: Sequence[int], at: Array, means: Array) -> None:
    """One layer: a line for each head, in the style that the head has in every panel."""
    axes.set_title(part.title.removeprefix(part.stack).strip(), pad=3)
    for head, mean in zip(part.heads, means, strict=True):
        colour, dashes = head_style(numbers.index(head))
        style = (0, dashes) if dashes else "solid"
        line = axes.plot(at, mean, color=colour, linestyle=style, linewidth=0.9, label=f"head {head}")[0]
        name_artist(line, f"layer-{part.call.site.layer}-head-{head}")
    axes.grid(True, axis="y")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_legend(figure: Figure, x: float, y: float, numbers: Sequence[int]) -> None:
    """A stroke and a number for each head, from (x, y) in inches; 24 heads a column."""
    shown = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    labels = [f"head {n}" for n in numbers]
    corner = x / figure.get_figwidth(), 1 - y / figure.get_figheight()
    figure.legend(
        [shown[label] for label in labels], labels, loc="upper left", bbox_to_anchor=corner, frameon=False, fontsize=6,
        handlelength=1.8, borderpad=0, borderaxespad=0, ncols=1 + len(numbers) // 24,
    )  # fmt: skip
