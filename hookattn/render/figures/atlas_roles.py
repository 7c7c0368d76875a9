"""The atlas of roles: what each head of a model is called, as the viewer's Overview shows it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ...errors import RenderError
from ..palette import GRID, NO_ROLE, ROLES, role_colour
from .atlas_grid import LABEL, Grid, label_grid
from .base import Heading, axes_at, empty_sheet, hide_frame, name_artist, text_at
from .colours import show_masked
from .fitting import fitted, text_width

if TYPE_CHECKING:
    from pandas import DataFrame

_WIDEST, _TALLEST = 5.0, 6.0
_LARGEST, _LEAST, _TIGHT = 0.3, 0.02, 0.05
"""Inches of a square: at the most, at the least where nobody asks for a width, and where the legend goes below."""
_FAINTEST = 0.3
"""The least strength of a head that has a role, so that its hue is seen."""


class _Named(NamedTuple):
    """The most telling role of a head, and the score that is its evidence, from 0 to 1."""

    role: str
    score: float


def draw_roles(table: DataFrame, grid: Grid, title: str, width: float | None) -> Figure:
    """A square for each head: hue for its role, strength for the role's score, and a legend with counts.

    Args:
        table: with ``layer``, ``head``, ``role`` and ``evidence``, as of :func:`hookattn.analyze.report`.
        grid: where its rows stand.
        title: above the picture; may be empty.
        width: inches; None: as wide as it is.

    Raises:
        RenderError: it can't be so narrow, or its roles are no text.
    """
    roles = [_texts("role", value) for value in table["role"]]
    evidence = [_texts("evidence", value) for value in table["evidence"]] if "evidence" in table.columns else roles
    named = [_named(some, why) for some, why in zip(roles, evidence, strict=True)]
    counts: dict[str, int] = {}
    for some in roles:
        for role in some:
            counts[role] = counts.get(role, 0) + 1
    known = [*ROLES]
    counts = dict(
        sorted(counts.items(), key=lambda item: (known.index(item[0]) if item[0] in ROLES else len(known), item))
    )
    if without := sum(not some for some in roles):
        counts[NO_ROLE] = without
    image = np.full((len(grid.rows), grid.columns, 4), 0.0)
    for row, head, found in zip(grid.of_row, grid.heads, named, strict=True):
        strength = 0.0 if found is None else min(1.0, max(_FAINTEST, found.score))
        colour = np.array(to_rgb(role_colour("" if found is None else found.role)))
        image[row, head] = (*(1 - strength * (1 - colour) if found is not None else np.array(to_rgb(GRID))), 1.0)
    return fitted(width, lambda room: _draw(image, grid, counts, title, room))


def _texts(name: str, value: Any) -> list[str]:
    if value is None or value != value:
        return []
    if not isinstance(value, str):
        raise RenderError(f"atlas: the column {name} has {value!r}; expected text.")
    return [part for part in value.split("; ") if part]


def _named(roles: list[str], evidence: list[str]) -> _Named | None:
    """The first role of a report is the most telling one; its evidence begins with the measure and the score."""
    if not roles:
        return None
    number = re.search(r" (\d+\.\d+)(?: \(uniform |$)", evidence[0]) if evidence else None
    return _Named(roles[0], float(number[1]) if number else 1.0)


def _draw(image: Any, grid: Grid, counts: dict[str, int], title: str, room: float | None) -> Figure:
    rows, columns = len(grid.rows), grid.columns
    said = {role: f"{role}  {n}" for role, n in counts.items()}
    beside = max(text_width(text, 6.5) for text in said.values()) + 0.3
    left = 0.2 + max(text_width(name, LABEL) for name in grid.rows)
    below = room is not None and (room - left - beside) / columns < _TIGHT
    spare = _WIDEST if room is None else room - left - 0.1 - (0.0 if below else beside)
    cell = max(
        _LEAST if room is None else 0.005, min(_LARGEST if room is None else 0.4, spare / columns, _TALLEST / rows)
    )
    heading = Heading(title, (), ()).within(room)
    top, panel = heading.height + 0.3, columns * cell
    across = max(1, int((left + panel) / beside)) if below else 1
    lines = -(-len(said) // across)
    tall = rows * cell + 0.12 + 0.16 * lines if below else max(rows * cell, 0.16 * lines)
    figure = empty_sheet(left + panel + (0 if below else beside), top + tall + 0.1)
    heading.draw(figure)
    axes = axes_at(figure, left, top, panel, rows * cell)
    show_masked(axes.patch)
    name_artist(axes.imshow(image, interpolation="nearest", aspect="auto"), "atlas-role")
    if cell > 0.06:
        # Heads are apart, as in the viewer.
        axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=min(1.5, cell * 72 / 12))
        axes.tick_params(which="minor", length=0)
    label_grid(axes, grid.rows, columns, cell, "layer")
    for n, (role, text) in enumerate(said.items()):
        line, column = divmod(n, across)
        x = 0.1 + column * beside if below else left + panel + 0.12
        y = top + 0.16 * line + (rows * cell + 0.12 if below else 0.0)
        swatch = axes_at(figure, x, y + 0.02, 0.1, 0.1)
        hide_frame(swatch)
        swatch.add_patch(Rectangle((0, 0), 1, 1, color=GRID if role == NO_ROLE else role_colour(role), linewidth=0))
        text_at(figure, x + 0.15, y, text, fontsize=6.5)
    return figure
