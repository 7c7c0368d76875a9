"""How one score comes about: q, each key, their product component by component, its sum, and the softmax."""

from __future__ import annotations

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
from .row import draw_bars, key_axes, key_label_width, label_keys, query_row

_HEAT, _BARS, _GAP = 1.9, 1.05, 0.16


@in_own_style
def neuron(trace: TraceLike, **where: Unpack[Where]) -> Figure:
    """One query of one head: q, k, q∘k, the scaled dot product, the score where it is more than that, the softmax.

    A row for each key. Colours of q and k, and of q∘k, go from minus to plus the largest magnitude, which is written
    beside them. Masked keys are hatched. Of more than 100 keys those that weigh most are listed, unless ``keys`` are
    given.

    Args:
        trace: in memory, loaded, or compact, with q, k, scores and weights (or what these are derived from).
        **where: what is drawn: :class:`hookattn.calls.part.Where`; ``heads`` and ``queries`` name one each, and
            without ``queries`` it is the last one.

    Returns:
        A figure.

    Raises:
        SelectionError: no one call, head or query; or scores that are no product of queries and keys.
        FieldNotCaptured: a field is not in the trace; names the ``capture=``.
    """
    found = query_row(as_trace(trace), "neuron", **where)
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
    heading = Heading.of([part], found.title, found.notes)
    left = 0.1 + key_label_width(found)
    top = heading.height + 0.62
    weight = f"weight ({part.call.normalizer})"
    lasting = ["scaled dot product", *(["score"] if finished else []), weight]
    figure = empty_sheet(left + 2 * (_HEAT + _GAP) + len(lasting) * (_BARS + _GAP), top + found.height + 0.12)
    heading.draw(figure)
    label_keys(figure, left - 0.05, top, found)
    x = left
    _draw_components(figure, x, top - 0.36, 0.13, q[None], "q", float(np.abs(q).max()))
    for name, values in (("k", k), ("q∘k", product)):
        top_value = float(np.abs(found.listed(values)).max())
        axes = _draw_components(figure, x, top, found.height, found.listed(values), name, top_value)
        axes.set_ylim(len(found.keys) - 0.5, -0.5)
        x += _HEAT + _GAP
    columns = {"scaled dot product": dots, "score": found.scores, weight: found.weights}
    for title in lasting:
        axes = key_axes(figure, x, top, _BARS, found, title)
        colour = WEIGHT if title.startswith("weight") else SCORE
        draw_bars(axes, found, columns[title], title.partition(" ")[0], colour)
        x += _BARS + _GAP
    return figure


def _scaled_dots(product: Array, scale: float | Tensor, i: int) -> Array:
    """S: the factor of the kernel times the sum of S D products."""
    if isinstance(scale, Tensor):
        factor = scale[0, 0].double().cpu().numpy()
        return np.asarray(product.sum(-1) * factor[i if len(factor) > 1 else 0])
    return np.asarray(product.sum(-1) * scale)


def _draw_components(figure: Figure, x: float, y: float, height: float, values: Array, name: str, most: float) -> Any:
    """Components across, from minus to plus the largest magnitude."""
    axes = axes_at(figure, x, y, _HEAT, height)
    edges = np.arange(values.shape[0] + 1) - 0.5
    mesh = axes.pcolormesh(
        np.arange(values.shape[1] + 1), edges, values, cmap=DIVERGING, vmin=-most or -1, vmax=most or 1,
        rasterized=values.size > 1 << 13,
    )  # fmt: skip
    name_artist(mesh, name)
    hide_frame(axes)
    axes.invert_yaxis()
    text_at(figure, x, y - 0.05, f"{name}  ±{most:.3g}", va="bottom", fontsize=6.8)
    return axes
