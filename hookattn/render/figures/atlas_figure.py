"""The atlas: layers down, heads across, each head a square as dark as a measure of it is large."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ... import checks
from ...errors import RenderError
from ..palette import GRID
from ..values import Array
from .base import Heading, axes_at, empty_sheet, in_own_style, name_artist, text_at
from .colours import DIVERGING, SEQUENTIAL, ColourScale, show_masked

if TYPE_CHECKING:
    from pandas import DataFrame

_PLACE = ("step", "example", "query", "token", "call", "layer", "stack", "kind", "path", "head", "role", "evidence")
_WIDEST, _TALLEST = 3.4, 4.5
_LARGEST, _LEAST = 0.3, 0.02
_GAP, _BAR = 0.35, 0.09
# So few points a number needs to be read.
_READABLE = 5.0


@in_own_style
def atlas(
    table: DataFrame,
    measures: str | Iterable[str] | None = None,
    *,
    title: str = "",
    largest: Mapping[str, float] | None = None,
) -> Figure:
    """All heads of a model by some measures: a panel for each, a row for each layer, a square for each head.

    A share of the attention has colours from 0 to 1, a correlation from −1 to 1, whatever the table has, so that
    pictures of several trainings, or steps of one, can be held against each other. Of other measures the range is from
    0 to the largest value. Squares that are hatched are heads for which the measure is not defined, or that are not
    there.

    Args:
        table: a row for each head, with ``layer``, ``head`` and the measures, as of
            :func:`hookattn.analyze.measure`, :func:`hookattn.analyze.report` or a
            :class:`hookattn.training.HeadMonitor`; ``attrs["units"]`` says what they are in.
        measures: which columns; all measures of the table.
        title: above the picture.
        largest: by measure where its colours end.

    Returns:
        A figure with one image for each measure, named ``atlas-<measure>``: a value for each layer and head.

    Raises:
        RenderError: the table has no such column, no heads, or two rows for one head.
        InputError, SelectionError: an argument is of another kind.
    """
    title = checks.text("title", title)
    names = _measures_of(table, measures)
    _check_numbers(table, names)
    ends = {} if largest is None else dict(checks.one_of("largest", largest, Mapping, "a largest value by measure"))
    if unknown := [name for name in ends if name not in names]:
        raise RenderError(
            f"largest has {checks.printed(unknown[0])}, which is not drawn; drawn are {', '.join(names)}."
        )
    units = table.attrs.get("units", {})
    grid = _grid_of(table)
    rows, columns = len(grid.rows), max(grid.heads) + 1
    # Squares, also where there are many: each panel is as wide as its heads need.
    cell = max(_LEAST, min(_LARGEST, _WIDEST / columns, _TALLEST / rows))
    left = 0.32 + 0.05 * max(map(len, grid.rows))
    panel, across = columns * cell, min(len(names), 4)
    wide = max(panel + left + 0.5, 1.5)
    heading = Heading(title, (), ())
    tall = 0.42 + rows * cell + _GAP
    figure = empty_sheet(across * wide + 0.1, heading.height + math.ceil(len(names) / across) * tall)
    heading.draw(figure)
    for n, name in enumerate(names):
        x, y = n % across * wide + left, heading.height + n // across * tall + 0.42
        text_at(figure, x, y - 0.4, f"{name}  {units.get(name, '')}".rstrip(), fontsize=7.5)
        values = grid.values(table[name])
        end = _end(name, values, ends)
        colours = _colours(units.get(name, ""), values, end)
        axes = axes_at(figure, x, y, panel, rows * cell)
        show_masked(axes.patch)
        image = axes.imshow(values, cmap=colours.map, norm=colours.norm, interpolation="nearest", aspect="auto")
        name_artist(image, f"atlas-{name}")
        _label(axes, grid.rows, columns, cell * 72, "layer" if n % across == 0 else "")
        bar = axes_at(figure, x + panel + 0.08, y, _BAR, max(rows * cell, 0.4))
        figure.colorbar(image, cax=bar).outline.set_visible(False)
        bar.tick_params(labelsize=5.5, length=1.5, pad=1)
    return figure


class _Grid(NamedTuple):
    """Where each row of a table stands.

    Attributes:
        rows: the names of the rows of the picture.
        of_row: for each row of the table its row in the picture,
        heads: and its column.
    """

    rows: list[str]
    of_row: list[int]
    heads: list[int]

    def values(self, column: Any) -> Array:
        """Rows × heads, masked where there is no value."""
        made = np.full((len(self.rows), max(self.heads) + 1), np.nan)
        made[self.of_row, self.heads] = column
        return np.ma.masked_invalid(made)


def _grid_of(table: DataFrame) -> _Grid:
    """A row for each layer, or, where layers have several attentions or no numbers, for each place of the model.

    Raises:
        RenderError: see :func:`atlas`.
    """
    if not len(table):
        raise RenderError("atlas: the table has no heads.")
    by = [name for name in ("stack", "kind", "layer") if name in table.columns]
    numbers = list(table["layer"])
    if any(layer is None or layer != layer for layer in numbers) and "path" in table.columns:
        by.append("path")
    if table.duplicated([*by, "head"]).any() and "call" in table.columns:
        by.append("call")
    if table.duplicated([*by, "head"]).any():
        raise RenderError(
            f"atlas: expected one row for each {', '.join(by)} and head; choose a step, example or query of the table."
        )
    places = table[by].drop_duplicates()
    telling = [name for name in by if places[name].nunique() > 1 and name != "layer"]
    key = [tuple(row) for row in table[by].astype(object).where(table[by].notna(), None).itertuples(index=False)]
    # Stacks and kinds as they come, each with its layers by their numbers, whatever the table was sorted by.
    first = list(dict.fromkeys(key))
    at_layer = by.index("layer")
    others = list(dict.fromkeys(place[:at_layer] for place in first))
    order = sorted(first, key=lambda place: (others.index(place[:at_layer]), place[at_layer] or 0))
    names = []
    for place in order:
        found = dict(zip(by, place, strict=True))
        number = "" if found.get("layer") is None else str(int(found["layer"]))
        names.append(" ".join([*(str(found[name]) for name in telling), number]).strip())
    at = {place: n for n, place in enumerate(order)}
    return _Grid(names, [at[one] for one in key], [int(head) for head in table["head"]])


def _measures_of(table: Any, measures: Any) -> list[str]:
    columns = getattr(table, "columns", None)
    if columns is None or not {"layer", "head"} <= {*columns}:
        raise RenderError(
            "atlas: expected a table with a row for each head, as hookattn.analyze.measure(trace, …) makes it, and got "
            f"{checks.printed(table) if columns is None else 'one of ' + ', '.join(map(str, columns))}."
        )
    there = [str(name) for name in columns if name not in _PLACE]
    if measures is None:
        chosen: Sequence[str] = there
    else:
        chosen = checks.several("measures", [measures] if isinstance(measures, str) else measures, str, "names")
    unknown = [name for name in chosen if name not in there]
    if unknown or not chosen:
        which = f"no column {unknown[0]!r}" if unknown else "no measure"
        raise RenderError(f"atlas: the table has {which}; it has {', '.join(there) or 'none'}.")
    return list(chosen)


def _check_numbers(table: DataFrame, names: Sequence[str]) -> None:
    """Raise a RenderError unless heads and measures are numbers."""
    for name in ("head", *names):
        column = table[name]
        if column.dtype.kind not in ("iu" if name == "head" else "iufb"):
            raise RenderError(f"atlas: the column {name} has no numbers{' of heads' * (name == 'head')}.")
    if len(table) and int(table["head"].min()) < 0:
        raise RenderError(f"atlas: the column head has {table['head'].min()}; heads are numbered from 0.")


def _end(name: str, values: Array, ends: Mapping[str, float]) -> float | None:
    if name in ends:
        return checks.number(f"largest[{name!r}]", ends[name], "a number above 0", lambda x: 0 < x < math.inf)
    return None


def _colours(unit: str, values: Array, end: float | None) -> ColourScale:
    found = np.ma.compressed(values)
    found = found[np.isfinite(found)]
    signed = unit == "correlation" or (found.size > 0 and found.min() < 0)
    most = float(np.abs(found).max()) if found.size else 1.0
    if end is None:
        end = max(1.0, most) if unit in ("share", "correlation") else most or 1.0
    if signed:
        return ColourScale(DIVERGING, Normalize(-end, end))
    return ColourScale(SEQUENTIAL, Normalize(0, end))


def _label(axes: Axes, rows: Sequence[str], columns: int, points: float, layer: str) -> None:
    """Numbers of heads above and of layers on the left: as many as can be read."""
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    every = max(1, math.ceil(1.6 * _READABLE / points))
    size = min(6.5, max(_READABLE, points * 0.5))
    axes.set_xticks(range(0, columns, every), [str(n) for n in range(0, columns, every)], fontsize=size)
    at = range(0, len(rows), max(1, math.ceil(_READABLE / points)))
    axes.set_yticks(at, [rows[n] for n in at], fontsize=size)
    axes.tick_params(length=0, pad=1.5)
    axes.set_xlabel("head", labelpad=2)
    axes.set_ylabel(layer, labelpad=2)
    for spine in axes.spines.values():
        spine.set_color(GRID)
