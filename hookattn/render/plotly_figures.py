"""Interactive figures of plotly: numbers under the pointer, zoom, heads switched on and off."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np

from .. import checks
from ..calls.choose import part_of_one_call, parts_of_one_stack
from ..calls.part import Part, Where
from ..errors import SelectionError
from ..optional import extra_named
from ..printable import printable
from ..traces import Trace, TraceLike, as_trace
from .by_distance import highest, lowest, mean_by_distance, notes_of
from .palette import INK, MASKED, PAPER, head_style
from .values import FLOOR, Field, Scale, Sink, check_options, drawn_values

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_MOST = 1024
_PIXELS = 64
_DASHES = ("solid", "dash", "dot", "dashdot")
_BLUES, _SCORES = "Blues", "PuOr_r"


def plotly(
    trace: TraceLike,
    view: Literal["matrix", "model", "distance"] = "matrix",
    *,
    field: Field = "weights",
    scale: Scale = "linear",
    sink: Sink = "show",
    **where: Unpack[Where],
) -> Figure:
    """A view as a figure of plotly, for notebooks and pages: ``figure.show()``, ``figure.write_html("x.html")``.

    Args:
        trace: in memory, loaded, or compact.
        view: ``matrix``, queries by keys for each head of one call; ``model``, layers by heads, each its largest value
            in each block of a 64 × 64 thumbnail; ``distance``, mean weight against distance.
        field: ``weights``, ``applied``, ``scores`` or ``mask``; of the first two views.
        scale: ``log`` colours, or plots, weights from 1e-4 to 1.
        sink: ``drop`` leaves out the first key, ``renormalise`` also divides each row by what is left; likewise.
        **where: what is drawn: :class:`hookattn.calls.part.Where`.

    Returns:
        A figure. Masked entries are gaps in its data (None), never 0.

    Raises:
        ModuleNotFoundError: plotly is not installed.
        SelectionError, FieldNotCaptured, InputError: as the figures of :mod:`hookattn.render` do.
    """
    check_options(field, scale, sink)
    checks.word("view", view, _VIEWS)
    if view == "distance" and (field != "weights" or sink != "show"):
        raise SelectionError("field and sink have no meaning in the distance view; leave them out.")
    with extra_named():
        figure = _VIEWS[view](as_trace(trace), field, scale, sink, where)
    figure.update_layout(
        template="plotly_white",
        plot_bgcolor=MASKED if view != "distance" else PAPER,
        paper_bgcolor=PAPER,
        font={"color": INK, "size": 11},
        hovermode="closest",
    )
    return figure


def _matrix(trace: Trace, field: Field, scale: Scale, sink: Sink, where: Where) -> Figure:
    part = part_of_one_call(trace, "matrix", **where)
    found = drawn_values(part, field, sink, most=_MOST)
    data, block = found.data, found.block
    heads = part.heads
    columns = min(len(heads), 4, math.ceil(math.sqrt(len(heads))))
    figure = _subplots([f"head {head}" for head in heads], columns)
    rows, across = (
        [labels[i] for i in at[::block]] for labels, at in _labels_and_places(part, found.rows, found.columns)
    )
    for n, head in enumerate(heads):
        place = {"row": n // columns + 1, "col": n % columns + 1}
        hover = [[f"query {q}<br>key {k}" for k in _escaped(across)] for q in _escaped(rows)]
        _add_heatmap(figure, data[n], hover, f"head {head}", place, scale)
        size = {"tickfont": {"size": max(7, min(11, 420 // max(len(rows), 1)))}}
        _set_ticks(figure, "y", rows, place, {**size, "autorange": "reversed"})
        _set_ticks(figure, "x", across, place, size)
    notes = [part.doubt, part.edited, *found.notes]
    notes += [f"each pixel is the largest of {block} × {block} entries"] if block > 1 else []
    _finish_layout(figure, field, scale, _title(part.title, notes), math.ceil(len(heads) / columns))
    return figure


def _model(trace: Trace, field: Field, scale: Scale, sink: Sink, where: Where) -> Figure:
    parts = parts_of_one_stack(trace, "model", **where)
    numbers = sorted({head for part in parts for head in part.heads})
    figure = _subplots([], len(numbers), len(parts))
    notes: list[str] = []
    for row, part in enumerate(parts, 1):
        found = drawn_values(part, field, sink, most=_PIXELS)
        data, block = found.data, found.block
        notes += [*_said_of(part), *found.notes]
        queries, keys = (
            [labels[i] for i in at[::block]] for labels, at in _labels_and_places(part, found.rows, found.columns)
        )
        hover = [[f"query {q}<br>key {k}" for k in _escaped(keys)] for q in _escaped(queries)]
        for n, head in enumerate(part.heads):
            place = {"row": row, "col": numbers.index(head) + 1}
            _add_heatmap(figure, data[n], hover, _escaped([f"{part.title}, head {head}"])[0], place, scale)
            figure.update_yaxes(autorange="reversed", showticklabels=False, **place)
            figure.update_xaxes(showticklabels=False, **place)
        figure.update_yaxes(title_text=str(part.call.site.layer), row=row, col=1)
    for n, head in enumerate(numbers, 1):
        figure.update_xaxes(title_text=str(head), row=len(parts), col=n)
    _finish_layout(
        figure, field, scale, _title(f"{parts[0].stack} layers down, heads across".strip(), notes), len(parts), 90
    )
    figure.update_layout(width=260 + 90 * len(numbers))
    return figure


def _distance(trace: Trace, field: Field, scale: Scale, sink: Sink, where: Where) -> Figure:
    import plotly.graph_objects as go

    parts = parts_of_one_stack(trace, "distance", **where)
    columns = min(4, math.ceil(math.sqrt(len(parts))))
    figure = _subplots([part.title for part in parts], columns)
    numbers = sorted({head for part in parts for head in part.heads})
    curves = [mean_by_distance(part) for part in parts]
    for n, (part, (at, means)) in enumerate(zip(parts, curves, strict=True)):
        for head, mean in zip(part.heads, means, strict=True):
            style = numbers.index(head)
            line = {"color": head_style(style)[0], "dash": _DASHES[style // 8 % len(_DASHES)], "width": 1.4}
            shown = all(head not in other.heads for other in parts[:n])
            made = go.Scatter(
                x=at, y=mean, mode="lines", line=line, name=f"head {head}", legendgroup=str(head), showlegend=shown
            )
            figure.add_trace(made, row=n // columns + 1, col=n % columns + 1)
    top = highest(curves)
    floor = [math.log10(FLOOR), math.log10(top)] if scale == "log" else [lowest(curves, top), top]
    figure.update_yaxes(type="log" if scale == "log" else "linear", range=floor)
    notes = [said for p in parts for said in _said_of(p)] + notes_of(parts)
    title = _title("mean weight against distance back to the key", notes)
    figure.update_layout(title=title, height=120 + 220 * math.ceil(len(parts) / columns))
    return figure


_VIEWS: dict[str, Callable[[Trace, Field, Scale, Sink, Where], Any]] = {
    "matrix": _matrix,
    "model": _model,
    "distance": _distance,
}


def _subplots(titles: list[str], columns: int, rows: int | None = None) -> Figure:
    from plotly.subplots import make_subplots

    rows = rows or math.ceil(len(titles) / columns)
    gaps = {"horizontal_spacing": min(0.06, 0.3 / columns), "vertical_spacing": min(0.12, 0.3 / rows)}
    return make_subplots(rows, columns, subplot_titles=_escaped(titles) or None, **gaps)


def _labels_and_places(part: Part, rows: tuple[int, ...], columns: tuple[int, ...]) -> tuple[Any, Any]:
    return (part.queries, rows), (part.keys, columns)


def _add_heatmap(figure: Figure, data: Any, hover: Any, name: str, place: dict[str, int], scale: str) -> None:
    """One matrix; the number under the pointer is the value itself, also where colours are logarithmic."""
    import plotly.graph_objects as go

    exact = np.ma.filled(data.astype(float), np.nan)
    drawn = np.log10(np.maximum(exact, FLOOR)) if scale == "log" else exact
    made = go.Heatmap(
        z=drawn, customdata=exact, text=hover, name=name, coloraxis="coloraxis", hoverongaps=False,
        hovertemplate="%{text}<br>%{customdata:.4g}<extra>" + name.replace("%{", "&#37;{") + "</extra>",
    )  # fmt: skip
    figure.add_trace(made, **place)


def _set_ticks(figure: Figure, which: str, labels: list[str], place: dict[str, int], more: dict[str, Any]) -> None:
    every = max(1, math.ceil(len(labels) / 50))  # more than 50 labels on an axis cover each other
    at = list(range(0, len(labels), every))
    update = figure.update_xaxes if which == "x" else figure.update_yaxes
    update(tickvals=at, ticktext=_escaped([labels[i] for i in at]), showgrid=False, zeroline=False, **more, **place)


def _finish_layout(figure: Figure, field: str, scale: str, title: dict[str, Any], rows: int, each: int = 460) -> None:
    heats = figure.select_traces(selector={"type": "heatmap"})
    axis: dict[str, Any] = {"colorscale": _BLUES, "cmin": 0.0, "cmax": 1.0, "colorbar": {"title": {"text": field}}}
    seen = [np.asarray(h.customdata, float) for h in heats]
    seen = [x[np.isfinite(x)] for x in seen]
    top = max((float(np.abs(x).max()) for x in seen if x.size), default=1.0) or 1.0
    if field == "scores" or (field != "mask" and scale != "log" and any((x < 0).any() for x in seen)):
        axis |= {"colorscale": _SCORES, "cmin": -top, "cmax": top}
    elif field != "mask" and top > 1.01:
        axis["cmax"] = top
    if scale == "log":
        ticks = list(range(round(math.log10(FLOOR)), 1))
        axis |= {"cmin": ticks[0], "cmax": max(0.0, math.log10(top)) if top > 1.01 else 0.0}
        axis["colorbar"] |= {"tickvals": ticks, "ticktext": [f"{10.0**t:g}" for t in ticks]}
    figure.update_layout(coloraxis=axis, title=title, height=120 + each * rows)
    figure.for_each_xaxis(lambda axis: axis.update(showgrid=False))
    figure.for_each_yaxis(lambda axis: axis.update(showgrid=False))


def _said_of(part: Part) -> list[str]:
    """What speaks against one of several parts, and what was edited in it."""
    return [f"{part.title}: {said}" for said in (part.doubt, part.edited) if said]


def _title(text: str, notes: list[str]) -> dict[str, Any]:
    said = " · ".join(dict.fromkeys(note for note in notes if note))
    return {"text": "<br>".join(_escaped([text, *([said] if said else [])])), "font": {"size": 14}}


def _escaped(labels: list[str]) -> list[str]:
    """Text that plotly, which reads some tags and formulas between dollars, shows as it is."""
    return [html.escape(printable(label), quote=False).replace("$", "&#36;") for label in labels]
