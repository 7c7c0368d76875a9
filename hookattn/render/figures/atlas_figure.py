"""The atlas: layers down, heads across, each head a square as dark as a measure of it is large."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ... import checks
from ...errors import RenderError
from ...traces import Trace, TraceLike, as_trace
from ..values import Array
from .atlas_grid import LABEL, Grid, grid_of, label_grid
from .atlas_roles import draw_roles
from .base import Heading, axes_at, empty_sheet, in_own_style, name_artist, text_at
from .colours import DIVERGING, SEQUENTIAL, ColourScale, show_masked
from .fitting import Width, fitted, text_width, title_of, width_in_inches, wrapped

if TYPE_CHECKING:
    from pandas import DataFrame

_PLACE = ("step", "example", "query", "token", "call", "layer", "stack", "kind", "path", "head", "role", "evidence")
_WIDEST, _TALLEST = 3.4, 4.5
_LARGEST, _LEAST = 0.3, 0.02
_GAP, _BAR, _BAR_ROOM = 0.2, 0.09, 0.5


@in_own_style
def atlas(
    table: DataFrame | TraceLike,
    measures: str | Iterable[str] | None = None,
    *,
    title: str | bool = True,
    largest: Mapping[str, float] | None = None,
    width: Width = None,
) -> Figure:
    """All heads of a model: a row for each layer, a square for each head, by its role or by some measures.

    Of a trace, or where the table is a report and no measures are asked for, one panel: the hue of a square is the role
    of the head, its strength the score that is the evidence, and a legend has how many heads have each role, as the
    viewer's Overview does. A head with several roles has the colour of the most telling one; a grey square has none
    that is clear.

    A share of the attention has colours from 0 to 1, a correlation from −1 to 1, whatever the table has, so that
    pictures of several trainings, or steps of one, can be held against each other. Of other measures the range is from
    0 to the largest value. Squares that are hatched are heads for which the measure is not defined, or that are not
    there.

    Args:
        table: a row for each head, with ``layer``, ``head`` and the measures, as of
            :func:`hookattn.analyze.measure`, :func:`hookattn.analyze.report` or a
            :class:`hookattn.training.HeadMonitor`; ``attrs["units"]`` says what they are in. A trace: its report.
        measures: which columns, a panel for each; None: the roles, or all measures of a table without any.
        title: above the picture.
        largest: by measure where its colours end.
        width: inches that the figure is wide, ``column`` (3.3) or ``page`` (7); None: as wide as it is.

    Returns:
        A figure with one image for each measure, named ``atlas-<measure>``: a value for each layer and head. Of roles:
        named ``atlas-role``, a colour for each.

    Raises:
        RenderError: the table has no such column, no heads, or two rows for one head; or it can't be so narrow.
        MeasureError: of a trace nothing can be measured.
        InputError, SelectionError: an argument is of another kind.
    """
    wide, title = width_in_inches(width), title_of(title, "")
    found = _table_of(table, measures)
    if measures is None and {"role", "layer", "head"} <= {*getattr(found, "columns", ())}:
        if largest is not None:
            raise RenderError("atlas: roles have no largest value; give measures= with it.")
        return draw_roles(found, grid_of(found), title, wide)
    names = _measures_of(found, measures)
    _check_numbers(found, names)
    ends = {} if largest is None else dict(checks.one_of("largest", largest, Mapping, "a largest value by measure"))
    if unknown := [name for name in ends if name not in names]:
        raise RenderError(
            f"largest has {checks.printed(unknown[0])}, which is not drawn; drawn are {', '.join(names)}."
        )
    grid = grid_of(found)
    return fitted(wide, lambda room: _draw(found, names, grid, ends, title, room))


def _table_of(table: Any, measures: Any) -> DataFrame:
    """What is drawn of: the table itself, or the report of a trace."""
    if isinstance(table, Trace | str | PathLike):
        from ...analyze import report

        return report(as_trace(table, "table"), measures)
    return table  # type: ignore[no-any-return]


def _draw(
    table: DataFrame, names: Sequence[str], grid: Grid, ends: Mapping[str, float], title: str, room: float | None
) -> Figure:
    units = table.attrs.get("units", {})
    rows, columns = len(grid.rows), grid.columns
    # Squares, also where there are many: each panel is as wide as its heads need.
    left = 0.2 + max(text_width(name, LABEL) for name in grid.rows)
    across = min(len(names), 4 if room is None else max(1, int(room / 1.6)))
    spare = _WIDEST if room is None else room / across - left - _BAR_ROOM
    cell = max(
        _LEAST if room is None else 0.005, min(_LARGEST if room is None else 0.45, spare / columns, _TALLEST / rows)
    )
    panel = columns * cell
    wide = max(panel + left + _BAR_ROOM, 1.5 if room is None else 0.0)
    heading = Heading(title, (), ()).within(room)
    told = {name: f"{name}  {units.get(name, '')}".rstrip() for name in names}
    told = {name: text if room is None else wrapped(text, wide - left, 7.0) for name, text in told.items()}
    above = 0.3 + 0.12 * max(text.count("\n") + 1 for text in told.values())
    tall = above + rows * cell + _GAP
    figure = empty_sheet(across * wide + 0.1, heading.height + math.ceil(len(names) / across) * tall)
    heading.draw(figure)
    for n, name in enumerate(names):
        x, y = n % across * wide + left, heading.height + n // across * tall + above
        text_at(figure, x, y - above + 0.02, told[name], fontsize=7.0)
        values = grid.values(table[name])
        end = _end(name, values, ends)
        colours = _colours(units.get(name, ""), values, end)
        axes = axes_at(figure, x, y, panel, rows * cell)
        show_masked(axes.patch)
        image = axes.imshow(values, cmap=colours.map, norm=colours.norm, interpolation="nearest", aspect="auto")
        name_artist(image, f"atlas-{name}")
        label_grid(axes, grid.rows, columns, cell, "layer" if n % across == 0 else "")
        bar = axes_at(figure, x + panel + 0.08, y, _BAR, max(rows * cell, 0.4))
        made = figure.colorbar(image, cax=bar)
        made.outline.set_visible(False)
        made.locator = MaxNLocator(3 if rows * cell < 0.8 else 5)
        made.update_ticks()
        bar.tick_params(labelsize=LABEL, length=1.5, pad=1)
    return figure


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
