"""All heads at once: layers down, heads across, each head as a thumbnail."""

from __future__ import annotations

from typing import Unpack

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ...calls.choose import one_stack
from ...calls.part import Part, Where
from ...traces import Trace
from ..palette import GRID
from ..values import Field, Scale, Sink, check, pooled, values
from .base import Heading, drawn, group, place, sheet
from .colours import colours, show_masked
from .heatmap_figure import draw_legend

_PIXELS = 64
_WIDEST, _LARGEST, _LEAST = 9.0, 0.75, 0.22
_MARGIN = 0.06


@drawn
def layers(
    trace: Trace, *, field: Field = "weights", scale: Scale = "linear", sink: Sink = "show", **where: Unpack[Where]
) -> Figure:
    """A grid of thumbnails, a row for each layer and a column for each head; queries down and keys across in each.

    A thumbnail of more than 64 positions shows the largest entry of each block, never a mean. Layers may have different
    numbers of heads, queries and keys. Cells without a thumbnail are heads that were not captured, or are not there.

    Args:
        trace: in memory, loaded, or compact; one stack, kind and step of it.
        field: ``weights``, ``scores`` (each head coloured by its own range) or ``mask``.
        scale, sink: as for :func:`hookattn.render.heatmap`.
        **where: what is drawn: :class:`hookattn.calls.part.Where`.

    Returns:
        A figure with one image for each head, named ``layer-N-head-M``.

    Raises:
        SelectionError: nothing fits, or several stacks, kinds or steps do.
        FieldNotCaptured: the field is not in the trace; names the ``capture=``.
    """
    check(field, scale, sink)
    parts = one_stack(trace, "layers", **where)
    numbers = sorted({head for part in parts for head in part.heads})
    cell = max(_LEAST, min(_LARGEST, (_WIDEST - 1.5) / len(numbers)))
    names = [_row_name(part) for part in parts]
    left = 0.2 + 0.055 * max(map(len, names)) + 0.15
    notes: list[str] = []
    found, block, masked, mapped = [], 1, False, None
    for part in parts:
        made = values(part, field, sink)
        small, n = pooled(made.data, _PIXELS)
        found.append(small)
        block, masked = max(block, n), masked or bool(made.data.mask.any())
        notes += made.notes
    if block > 1:
        notes.append(f"each pixel is the largest of up to {block} × {block} entries")
    heading = Heading.of(parts, parts[0].stack, notes)
    top = heading.height + 0.3
    figure = sheet(left + len(numbers) * cell + 1.1, top + len(parts) * cell + 0.15)
    heading.draw(figure)
    axes = place(figure, left, top, len(numbers) * cell, len(parts) * cell)
    axes.set(xlim=(0, len(numbers)), ylim=(len(parts), 0))
    for row, (part, small) in enumerate(zip(parts, found, strict=True)):
        for n, head in enumerate(part.heads):
            mapped = colours(small[n], field, scale)
            column = numbers.index(head)
            m = _MARGIN
            box = (column + m, column + 1 - m, row + 1 - m, row + m)
            behind = Rectangle((column + m, row + m), 1 - 2 * m, 1 - 2 * m, zorder=-1)
            show_masked(axes.add_patch(behind))
            image = axes.imshow(
                small[n], cmap=mapped[0], norm=mapped[1], extent=box, interpolation="nearest", aspect="auto"
            )
            group(image, f"layer-{row if part.call.site.layer is None else part.call.site.layer}-head-{head}")
    axes.set(xlim=(0, len(numbers)), ylim=(len(parts), 0), xlabel="head", ylabel="layer")
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    size = min(6.5, cell * 72 * 0.45)
    axes.set_xticks([i + 0.5 for i in range(len(numbers))], [str(n) for n in numbers], fontsize=size)
    axes.set_yticks([i + 0.5 for i in range(len(parts))], names, fontsize=min(6.5, cell * 72 * 0.6))
    axes.tick_params(length=0, pad=2)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    assert mapped is not None
    draw_legend(figure, left + len(numbers) * cell + 0.15, top + 0.12, mapped, field, scale, masked)
    return figure


def _row_name(part: Part) -> str:
    return part.call.site.label if part.call.site.layer is None else str(part.call.site.layer)
