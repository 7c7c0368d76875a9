"""How one score comes about: q, each key, their product component by component, its sum, and the softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ...calls.part import Where
from ...errors import SelectionError
from ...traces import TraceLike, as_trace
from ..palette import SCORE, WEIGHT
from ..values import Array, part_array
from .base import Heading, axes_at, empty_sheet, hide_frame, in_own_style, name_artist, text_at
from .colours import DIVERGING
from .fitting import Width, fitted, title_of, width_in_inches, wrapped
from .row import QueryRow, draw_bars, key_axes, key_label_width, label_keys, query_row

_HEAT, _BARS, _GAP, _NARROWEST = 1.9, 1.05, 0.16, 0.68


@in_own_style
def neuron(trace: TraceLike, *, width: Width = None, title: str | bool = True, **where: Unpack[Where]) -> Figure:
    """One query of one head: q, k, q∘k, the scaled dot product, the score where it is more than that, the softmax.

    A row for each key. Colours of q and k, and of q∘k, go from minus to plus the largest magnitude, which is written
    beside them. Masked keys are hatched. Of more than 100 keys those that weigh most are listed, unless ``keys`` are
    given.

    Args:
        trace: in memory, loaded, or compact, with q, k, scores and weights (or what these are derived from).
        width, title: as for :func:`hookattn.render.heatmap`.
        **where: what is drawn: :class:`hookattn.calls.part.Where`; ``heads`` and ``queries`` name one each, and
            without ``queries`` it is the last one.

    Returns:
        A figure.

    Raises:
        SelectionError: no one call, head or query; or scores that are no product of queries and keys.
        FieldNotCaptured: a field is not in the trace; names the ``capture=``.
        RenderError: it can't be so narrow.
    """
    wide = width_in_inches(width)
    found = query_row(as_trace(trace), "neuron", **where)
    title = title_of(title, found.title)
    part, i = found.part, found.query
    scale = part.call.scale
    if scale is None:
        raise SelectionError(
            f"neuron takes apart the product of a query and a key, and the scores of {part.title} are none (call.score "
            f"is {part.call.score!r})."
        )
    q, k = part_array(part, "q")[0, i], part_array(part, "k")[0]
    product = q * k
    dots = _scaled_dots(product, scale, i)
    finished = part.call.softcap is not None or part.field("bias", i) is not None or part.call.own_scores
    columns = {"scaled dot product": dots, **({"score": found.scores} if finished else {})}
    columns[f"weight ({part.call.normalizer})"] = found.weights
    return fitted(wide, lambda room: _draw(found, q, k, columns, title, room))


def _draw(found: QueryRow, q: Array, k: Array, columns: Mapping[str, Array], title: str, room: float | None) -> Figure:
    heading = Heading.of([found.part], title, found.notes).within(room)
    left = 0.1 + key_label_width(found, room)
    top = heading.height + 0.74
    heat, bars, gap = _HEAT, _BARS, _GAP
    if room is not None:
        gap = 0.1
        spare = max(1.0, room - left - gap * (2 + len(columns)))
        whole = 2 * _HEAT + len(columns) * _BARS
        heat, bars = spare * _HEAT / whole, spare * _BARS / whole
        if bars < _NARROWEST:  # numbers beside bars need their room, and the components can do with less
            bars = _NARROWEST
            heat = max(0.25, (spare - bars * len(columns)) / 2)
    figure = empty_sheet(left + 2 * (heat + gap) + len(columns) * (bars + gap), top + found.height + 0.12)
    heading.draw(figure)
    label_keys(figure, left - 0.05, top, found, room)
    x = left
    _draw_components(figure, x, top - 0.44, 0.13, heat, q[None], "q", float(np.abs(q).max()))
    for name, values in (("k", k), ("q∘k", q * k)):
        top_value = float(np.abs(found.listed(values)).max())
        axes = _draw_components(figure, x, top, found.height, heat, found.listed(values), name, top_value)
        axes.set_ylim(len(found.keys) - 0.5, -0.5)
        x += heat + gap
    for name, values in columns.items():
        told = wrapped(name, bars, 6.8) if room is not None else name
        axes = key_axes(figure, x, top, bars, found, told)
        draw_bars(axes, found, values, name.partition(" ")[0], WEIGHT if name.startswith("weight") else SCORE)
        x += bars + gap
    return figure


def _scaled_dots(product: Array, scale: float | Tensor, i: int) -> Array:
    """S: the factor of the kernel times the sum of S D products."""
    if isinstance(scale, Tensor):
        factor = scale[0, 0].double().cpu().numpy()
        return np.asarray(product.sum(-1) * factor[i if len(factor) > 1 else 0])
    return np.asarray(product.sum(-1) * scale)


def _draw_components(
    figure: Figure, x: float, y: float, height: float, width: float, values: Array, name: str, most: float
) -> Any:
    """Components across, from minus to plus the largest magnitude."""
    axes = axes_at(figure, x, y, width, height)
    edges = np.arange(values.shape[0] + 1) - 0.5
    mesh = axes.pcolormesh(
        np.arange(values.shape[1] + 1), edges, values, cmap=DIVERGING, vmin=-most or -1, vmax=most or 1,
        rasterized=values.size > 1 << 13,
    )  # fmt: skip
    name_artist(mesh, name)
    hide_frame(axes)
    axes.invert_yaxis()
    said = wrapped(f"{name}  ±{most:.3g}", width + 0.05, 6.8)
    text_at(figure, x, y - 0.05, said, va="bottom", fontsize=6.8)
    return axes
