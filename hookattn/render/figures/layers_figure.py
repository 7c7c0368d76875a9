"""All heads at once: layers down, heads across, each head as a thumbnail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from ...calls.choose import parts_of_one_stack
from ...calls.part import Part, Where
from ...traces import TraceLike, as_trace
from ..palette import GRID
from ..values import (
    WEIGHTS,
    DrawnValues,
    Field,
    Scale,
    Sink,
    check_options,
    drawn_values,
    has_negative,
    largest_magnitude,
)
from .base import Heading, axes_at, empty_sheet, in_own_style, name_artist
from .colours import ColourScale, colour_scale, show_masked
from .fitting import Width, fitted, text_width, title_of, width_in_inches
from .heatmap_figure import draw_legend

_PIXELS = 64
_WIDEST, _LARGEST, _LEAST = 9.0, 0.75, 0.22
_LEGEND, _LABEL = 0.85, 6.0
_MARGIN = 0.06


@in_own_style
def layers(
    trace: TraceLike,
    *,
    field: Field = "weights",
    scale: Scale = "linear",
    sink: Sink = "show",
    width: Width = None,
    title: str | bool = True,
    **where: Unpack[Where],
) -> Figure:
    """A grid of thumbnails, a row for each layer and a column for each head; queries down and keys across in each.

    A thumbnail of more than 64 positions shows the largest entry of each block, never a mean. Layers may have different
    numbers of heads, queries and keys. Cells without a thumbnail are heads that were not captured, or are not there.

    Args:
        trace: in memory, loaded, or compact; one stack, kind and step of it.
        field: ``weights``, ``applied``, ``scores`` or ``mask``. Each head is coloured by its own range: the legend
            says so where they differ.
        scale, sink, width, title: as for :func:`hookattn.render.heatmap`.
        **where: what is drawn: :class:`hookattn.calls.part.Where`.

    Returns:
        A figure with one image for each head, named ``layer-N-head-M``.

    Raises:
        SelectionError: nothing fits, or several stacks, kinds or steps do.
        FieldNotCaptured: the field is not in the trace; names the ``capture=``.
        RenderError: it can't be so narrow.
    """
    check_options(field, scale, sink)
    wide = width_in_inches(width)
    parts = parts_of_one_stack(as_trace(trace), "layers", **where)
    title = title_of(title, parts[0].stack)
    grid = _thumbnails(parts, field, sink)
    return fitted(wide, lambda room: _draw(parts, grid, field, scale, title, room))


def _draw(parts: Sequence[Part], grid: _Thumbnails, field: str, scale: str, title: str, room: float | None) -> Figure:
    numbers = sorted({head for part in parts for head in part.heads})
    names = [_row_name(part) for part in parts]
    left = 0.2 + max(text_width(name, _LABEL) for name in names) + 0.1
    spare = (_WIDEST if room is None else room) - left - _LEGEND
    cell = min(_LARGEST if room is None else 1.2, max(_LEAST if room is None else 0.02, spare / len(numbers)))
    heading = Heading.of(parts, title, grid.notes).within(room)
    top = heading.height + 0.3
    figure = empty_sheet(left + len(numbers) * cell + _LEGEND, top + len(parts) * cell + 0.15)
    heading.draw(figure)
    axes = axes_at(figure, left, top, len(numbers) * cell, len(parts) * cell)
    axes.set(xlim=(0, len(numbers)), ylim=(len(parts), 0))
    scales: list[ColourScale] = []
    for row, (part, found) in enumerate(zip(parts, grid.found, strict=True)):
        layer = row if part.call.site.layer is None else part.call.site.layer
        for n, head in enumerate(part.heads):
            small = found.data[n]
            below = field in WEIGHTS and has_negative(small)
            mapped = colour_scale(found.ends[n], largest_magnitude(small), field, scale, below)
            scales.append(mapped)
            name_artist(_draw_thumbnail(axes, row, numbers.index(head), small, mapped), f"layer-{layer}-head-{head}")
    # A picture moves the limits of its axes to itself, so they are set again.
    axes.set(xlim=(0, len(numbers)), ylim=(len(parts), 0), xlabel="head", ylabel="layer")
    _label_cells(axes, numbers, names, cell)
    draw_legend(figure, left + len(numbers) * cell + 0.15, top + 0.12, scales, field, grid.masked)
    return figure


@dataclass(frozen=True, eq=False)
class _Thumbnails:
    """All heads, pooled.

    Attributes:
        found: for each call what is drawn of it.
        masked: whether any entry is masked.
        notes: what a reader has to know.
    """

    found: list[DrawnValues]
    masked: bool
    notes: list[str]


def _thumbnails(parts: Sequence[Part], field: str, sink: str) -> _Thumbnails:
    found = [drawn_values(part, field, sink, most=_PIXELS) for part in parts]
    block = max(own.block for own in found)
    notes = [note for own in found for note in own.notes]
    if block > 1:
        notes.append(f"each pixel is the largest of up to {block} × {block} entries")
    return _Thumbnails(found, any(own.masked for own in found), notes)


def _draw_thumbnail(axes: Axes, row: int, column: int, image: Any, mapped: ColourScale) -> AxesImage:
    """A picture in a cell of the grid, on a hatched ground, which masked entries let through."""
    low, high = _MARGIN, 1 - _MARGIN
    ground = Rectangle((column + low, row + low), high - low, high - low, zorder=-1)
    show_masked(axes.add_patch(ground))
    box = (column + low, column + high, row + high, row + low)
    return axes.imshow(image, cmap=mapped.map, norm=mapped.norm, extent=box, interpolation="nearest", aspect="auto")


def _label_cells(axes: Axes, heads: Sequence[int], rows: Sequence[str], cell: float) -> None:
    """Numbers of heads above and names of layers on the left, as many as there is room for; ``cell`` in inches."""
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    across = max(1, math.ceil((text_width(str(heads[-1]), _LABEL) + 0.04) / cell))
    down = max(1, math.ceil(_LABEL / 72 * 1.1 / cell))
    axes.set_xticks([i + 0.5 for i in range(0, len(heads), across)], [str(n) for n in heads[::across]], fontsize=_LABEL)
    axes.set_yticks([i + 0.5 for i in range(0, len(rows), down)], rows[::down], fontsize=_LABEL)
    axes.tick_params(length=0, pad=2)
    for spine in axes.spines.values():
        spine.set_color(GRID)


def _row_name(part: Part) -> str:
    return part.call.site.label if part.call.site.layer is None else str(part.call.site.layer)
