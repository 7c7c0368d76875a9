"""Interactive figures of plotly: numbers under the pointer, zoom, heads switched on and off."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack

import numpy as np

from .. import checks
from ..calls.choose import part_of_one_call, parts_of_one_stack
from ..calls.part import Part, Where
from ..errors import SelectionError
from ..optional import extra_named
from ..printable import printable
from ..tokens.display import shortened
from ..traces import Trace, TraceLike, as_trace
from .by_distance import highest, lowest, mean_by_distance, notes_of
from .palette import DIVERGING_STOPS, HATCH, INK, MASKED, PAPER, SEQUENTIAL_STOPS, head_style
from .values import FLOOR, Field, Scale, Sink, check_options, drawn_values, has_negative, largest_magnitude

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_MOST = 1024
_PIXELS = 64
_PANEL, _CELL = 380, 22
"""Pixels of the longer side of a panel at the most, and of a cell."""
_LETTER, _LINE = 6.5, 13
"""Pixels of a character of a label, and from one line of labels to the next."""
_LONGEST, _GAP = 16, 34
_SCALES = {
    name: [[i / (len(stops) - 1), colour] for i, colour in enumerate(stops)]
    for name, stops in (("weights", SEQUENTIAL_STOPS), ("scores", DIVERGING_STOPS))
}


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
        A figure. Masked entries are gaps in its data (None), never 0, and grey, as a legend says; each cell is a
        square.

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
    shape = _Sheet.of(rows, across, columns, math.ceil(len(heads) / columns))
    for n in range(len(heads)):
        place = {"row": n // columns + 1, "col": n % columns + 1}
        first, last = n % columns == 0, n + columns >= len(heads)
        _set_ticks(figure, "y", rows if first else [], place, shape.cell, {"autorange": "reversed"})
        _set_ticks(figure, "x", across if last else [], place, shape.cell, {})
        if first:
            figure.update_yaxes(title_text="query", title_standoff=6, **place)
        if last:
            figure.update_xaxes(title_text="key", title_standoff=6, **place)
    notes = [part.doubt, part.edited, *found.notes]
    notes += [f"each pixel is the largest of {block} × {block} entries"] if block > 1 else []
    shape.lay_out(figure)
    _finish_layout(figure, field, scale, _title(part.title, notes), found.end, found.masked)
    return figure


class _Sheet(NamedTuple):
    """Where the panels of a figure are, in pixels: their cells are squares whatever the number of tokens.

    Attributes:
        cell: side of a cell.
        width, height: of a panel.
        columns, rows: of panels.
        left, below: what the labels take.
    """

    cell: float
    width: float
    height: float
    columns: int
    rows: int
    left: float
    below: float

    @classmethod
    def of(cls, down: list[str], across: list[str], columns: int, rows: int) -> _Sheet:
        """Of panels with these labels."""
        cell = min(_CELL, _PANEL / max(len(down), len(across), 1))
        left, below = (40 + _LETTER * max(len(shortened(x, _LONGEST)) for x in labels) for labels in (down, across))
        return cls(cell, len(across) * cell, len(down) * cell, columns, rows, left, below)

    @property
    def whole(self) -> tuple[float, float]:
        """Of all panels with the gaps between them."""
        return self.columns * (self.width + _GAP) - _GAP, self.rows * (self.height + _GAP) - _GAP

    def lay_out(self, figure: Figure) -> None:
        """Put the panels, the titles above them and the margins where they belong."""
        wide, high = self.whole
        n = 0
        for row in range(self.rows):
            for column in range(self.columns):
                n += 1
                key = "" if n == 1 else str(n)
                left, top = column * (self.width + _GAP), row * (self.height + _GAP)
                figure.layout[f"xaxis{key}"].domain = _within(left / wide, (left + self.width) / wide)
                figure.layout[f"yaxis{key}"].domain = _within(1 - (top + self.height) / high, 1 - top / high)
        for at, note in enumerate(figure.layout.annotations):
            left, top = at % self.columns * (self.width + _GAP), at // self.columns * (self.height + _GAP)
            note.update(x=(left + self.width / 2) / wide, y=1 - top / high, yanchor="bottom")
        margin = {"l": self.left, "r": 130, "t": 90, "b": self.below}
        width, height = max(wide + self.left + 130, 360), max(high, 150) + 90 + self.below
        if wide + self.left + 130 < 360:
            margin["r"] = 360 - wide - self.left
        if high < 150:
            margin["b"] += 150 - high
        figure.update_layout(width=round(width), height=round(height), margin=margin)


def _within(low: float, high: float) -> list[float]:
    """A domain, which rounding may have made a little more than all."""
    return [max(0.0, low), min(1.0, high)]


def _model(trace: Trace, field: Field, scale: Scale, sink: Sink, where: Where) -> Figure:
    parts = parts_of_one_stack(trace, "model", **where)
    numbers = sorted({head for part in parts for head in part.heads})
    figure = _subplots([], len(numbers), len(parts))
    notes: list[str] = []
    masked = False
    for row, part in enumerate(parts, 1):
        found = drawn_values(part, field, sink, most=_PIXELS)
        masked = masked or found.masked
        data, block = found.data, found.block
        notes += [*_said_of(part), *found.notes]
        queries, keys = (
            [labels[i] for i in at[::block]] for labels, at in _labels_and_places(part, found.rows, found.columns)
        )
        hover = [[f"query {q}<br>key {k}" for k in _escaped(keys)] for q in _escaped(queries)]
        for n, head in enumerate(part.heads):
            place = {"row": row, "col": numbers.index(head) + 1}
            end = largest_magnitude(data[n]) if has_negative(data[n]) else found.ends[n]
            name = _escaped([f"{part.title}, head {head}"])[0]
            _add_heatmap(figure, data[n], hover, name, place, scale, 1.0 if field == "mask" else end or 1.0)
            figure.update_yaxes(autorange="reversed", showticklabels=False, **place)
            figure.update_xaxes(showticklabels=False, **place)
        figure.update_yaxes(title_text=str(part.call.site.layer), row=row, col=1)
    for n, head in enumerate(numbers, 1):
        figure.update_xaxes(title_text=str(head), title_standoff=2, row=len(parts), col=n)
    title = _title(f"{parts[0].stack} layers down, heads across".strip(), notes)
    _Sheet(90, 90, 90, len(numbers), len(parts), 60, 50).lay_out(figure)
    _finish_layout(figure, field, scale, title, None, masked)
    return figure


def _distance(trace: Trace, field: Field, scale: Scale, sink: Sink, where: Where) -> Figure:
    import plotly.graph_objects as go

    parts = parts_of_one_stack(trace, "distance", **where)
    columns = min(4, math.ceil(math.sqrt(len(parts))))
    figure = _subplots([part.title for part in parts], columns)
    curves = [mean_by_distance(part) for part in parts]
    for n, (part, (at, means)) in enumerate(zip(parts, curves, strict=True)):
        for head, mean in zip(part.heads, means, strict=True):
            colour, dashes = head_style(head)
            dash = ",".join(f"{2 * on:g}px" for on in dashes) or "solid"
            line = {"color": colour, "dash": dash, "width": 1.4}
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
    rows = math.ceil(len(parts) / columns)
    for n in range(len(parts)):
        place = {"row": n // columns + 1, "col": n % columns + 1}
        if n % columns == 0:
            figure.update_yaxes(title_text="mean weight", **place)
        if n + columns >= len(parts):
            figure.update_xaxes(title_text="distance back to the key", **place)
    figure.update_layout(title=title, height=120 + 220 * rows)
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


def _add_heatmap(
    figure: Figure, data: Any, hover: Any, name: str, place: dict[str, int], scale: str, end: float = 1.0
) -> None:
    """One matrix, whose linear colours are of shares of ``end``; the number under the pointer is the value itself."""
    import plotly.graph_objects as go

    exact = np.ma.filled(data.astype(float), np.nan)
    drawn = np.log10(np.maximum(exact, FLOOR)) if scale == "log" else exact / end
    made = go.Heatmap(
        z=drawn, customdata=exact, text=hover, name=name, coloraxis="coloraxis", hoverongaps=False,
        hovertemplate="%{text}<br>%{customdata:.4g}<extra>" + name.replace("%{", "&#37;{") + "</extra>",
    )  # fmt: skip
    figure.add_trace(made, **place)


def _set_ticks(
    figure: Figure, which: str, labels: list[str], place: dict[str, int], cell: float, more: dict[str, Any]
) -> None:
    """Labels that don't cover each other, upright below an axis; of no labels no ticks."""
    every = max(1, math.ceil(_LINE / cell))
    at = list(range(0, len(labels), every))
    update = figure.update_xaxes if which == "x" else figure.update_yaxes
    texts = _escaped([shortened(labels[i], _LONGEST) for i in at])
    turned = {"tickangle": -90} if which == "x" else {}
    look = {"showgrid": False, "zeroline": False, "tickfont": {"size": 10}, "showticklabels": bool(labels)}
    update(tickmode="array", tickvals=at, ticktext=texts, **look, **turned, **more, **place)


def _finish_layout(
    figure: Figure, field: str, scale: str, title: dict[str, Any], end: float | None, masked: bool
) -> None:
    """Colours by the scale of all figures, with a short bar; what is grey is said below it.

    Args:
        end: where linear colours of weights end; None: each matrix is drawn in shares of its own end.
    """
    heats = list(figure.select_traces(selector={"type": "heatmap"}))
    seen = [np.asarray(h.customdata, float) for h in heats]
    seen = [x[np.isfinite(x)] for x in seen]
    top = max((float(np.abs(x).max()) for x in seen if x.size), default=1.0) or 1.0
    bar: dict[str, Any] = {
        "title": {"text": field, "side": "top"}, "lenmode": "pixels", "len": 130, "thickness": 12, "y": 1,
        "yanchor": "top", "x": 1, "xpad": 14, "xanchor": "left", "outlinewidth": 0,
    }  # fmt: skip
    axis: dict[str, Any] = {"colorscale": _SCALES["weights"], "cmin": 0.0, "cmax": 1.0, "colorbar": bar}
    if field == "mask":
        axis["showscale"] = False
    elif field == "scores" or (scale != "log" and any((x < 0).any() for x in seen)):
        axis |= {"colorscale": _SCALES["scores"], "cmin": -top, "cmax": top}
        if end is None:
            axis |= {"cmin": -1.0, "cmax": 1.0}
            bar |= {"tickvals": [-1, 0, 1], "ticktext": ["−own end", "0", "own end"]}
    elif scale == "log":
        low, high = math.log10(FLOOR), math.log10(max(top, 10 * FLOOR))
        at = [float(k) for k in range(round(low), math.floor(high - 0.3) + 1)]
        axis |= {"cmin": low, "cmax": high}
        told = [f"≤ {FLOOR:g}", *(f"{10.0**k:g}" for k in at[1:])]
        bar |= {"tickvals": [*at, high], "ticktext": [*told, f"{10**high:.2g}"]}
    else:
        axis["cmax"] = last = 1.0 if end is None else end or 1.0
        beyond = "≥ " if any((np.asarray(h.z, float) > last).any() for h in heats) else ""  # NaN is larger than nothing
        at = [0.0] if end is None else _round_numbers(last)
        ending = beyond + ("own end" if end is None else f"{last:.3g}")
        bar |= {"tickvals": [*at, last], "ticktext": [*(f"{x:g}" for x in at), ending]}
    if masked:
        top = 0 if field == "mask" else -160
        box = {"xsizemode": "pixel", "ysizemode": "pixel", "xanchor": 1, "yanchor": 1, "x0": 14, "x1": 24}
        where = {"xref": "paper", "yref": "paper"}
        line = {"color": HATCH, "width": 1}
        figure.add_shape(**where, **box, y0=top - 14, y1=top - 4, fillcolor=MASKED, line=line)
        text = {"text": "masked", "showarrow": False, "xshift": 28, "yshift": top}
        figure.add_annotation(**where, **text, x=1, y=1, xanchor="left", yanchor="top")
    figure.update_layout(coloraxis=axis, title=title)
    figure.for_each_xaxis(lambda axis: axis.update(showgrid=False))
    figure.for_each_yaxis(lambda axis: axis.update(showgrid=False))


def _round_numbers(end: float) -> list[float]:
    """From 0 on, three to five in all, which leave room for ``end`` itself."""
    unit = 10.0 ** (math.floor(math.log10(end)) - 1)
    step = next(unit * n for n in (2, 5, 10, 20, 50) if end / (unit * n) <= 5)
    return [step * n for n in range(math.ceil(end * 0.9 / step))]


def _said_of(part: Part) -> list[str]:
    """What speaks against one of several parts, and what was edited in it."""
    return [f"{part.title}: {said}" for said in (part.doubt, part.edited) if said]


def _title(text: str, notes: list[str]) -> dict[str, Any]:
    said = " · ".join(dict.fromkeys(note for note in notes if note))
    return {"text": "<br>".join(_escaped([text, *([said] if said else [])])), "font": {"size": 14}}


def _escaped(labels: list[str]) -> list[str]:
    """Text that plotly, which reads some tags and formulas between dollars, shows as it is."""
    return [html.escape(printable(label), quote=False).replace("$", "&#36;") for label in labels]
