"""Where the heads of a table stand in a picture of layers by heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from ...errors import RenderError
from ..palette import GRID
from ..values import Array
from .fitting import text_width
from .ticks import SMALLEST

if TYPE_CHECKING:
    from pandas import DataFrame

LABEL = SMALLEST
"""Points of the numbers of heads and layers."""


class Grid(NamedTuple):
    """Where each row of a table stands.

    Attributes:
        rows: the names of the rows of the picture.
        of_row: for each row of the table its row in the picture,
        heads: and its column.
    """

    rows: list[str]
    of_row: list[int]
    heads: list[int]

    @property
    def columns(self) -> int:
        """How many columns the picture has."""
        return max(self.heads) + 1

    def values(self, column: Any) -> Array:
        """Rows × heads, masked where there is no value."""
        made = np.full((len(self.rows), self.columns), np.nan)
        made[self.of_row, self.heads] = column
        return np.ma.masked_invalid(made)


def grid_of(table: DataFrame) -> Grid:
    """A row for each layer, or, where layers have several attentions or no numbers, for each place of the model.

    Raises:
        RenderError: see :func:`hookattn.render.atlas`.
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
    return Grid(names, [at[one] for one in key], [int(head) for head in table["head"]])


def label_grid(axes: Axes, rows: Sequence[str], columns: int, cell: float, layer: str) -> None:
    """Numbers of heads above and of layers on the left, as many as can be read; ``cell`` in inches."""
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    every = max(1, math.ceil((text_width(str(columns - 1), LABEL) + 0.03) / cell))
    axes.set_xticks(range(0, columns, every), [str(n) for n in range(0, columns, every)], fontsize=LABEL)
    at = range(0, len(rows), max(1, math.ceil(LABEL / 72 * 1.1 / cell)))
    axes.set_yticks(at, [rows[n] for n in at], fontsize=LABEL)
    axes.tick_params(length=0, pad=1.5)
    axes.set_xlabel("head", labelpad=2)
    axes.set_ylabel(layer, labelpad=2)
    for spine in axes.spines.values():
        spine.set_color(GRID)
