"""One query of one head, its keys as rows of a table: what the neuron view and the lens share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...calls.choose import part_of_one_call
from ...calls.part import Part, Where
from ...errors import SelectionError
from ...traces import Trace
from ..palette import FAINT
from ..values import UNKNOWN, Array, Flags, hidden_keys, part_array
from .base import axes_at, hide_frame, name_artist, text_at
from .colours import show_masked
from .fitting import text_width
from .ticks import SMALLEST, font_size, label_width, short_labels

_MOST = 100
_TALLEST, _ROW = 9.0, 0.16
_LABELS = 0.22
"""The part of a narrow figure that labels may take."""


@dataclass(frozen=True, eq=False)
class QueryRow:
    """One query of one head.

    Attributes:
        part: where it is; one head, and one query that is drawn.
        query: which of its T queries it is.
        keys: the keys that are listed, in their order.
        hidden: S, True where the mask hides a key; None where the mask was not captured.
        scores: S.
        weights: S.
        notes: what a reader has to know.
    """

    part: Part
    query: int
    keys: tuple[int, ...]
    hidden: Flags | None
    scores: Array
    weights: Array
    notes: tuple[str, ...]

    @property
    def spacing(self) -> float:
        """Inches from one key to the next."""
        return min(_ROW, _TALLEST / len(self.keys))

    @property
    def height(self) -> float:
        """Inches that the keys take."""
        return self.spacing * len(self.keys)

    def labels(self, room: float | None) -> list[str]:
        """Labels of the keys that are listed, shortened where the figure has so few inches."""
        most = None if room is None else _LABELS * room
        return short_labels([self.part.keys[j] for j in self.keys], self.spacing, most)

    @property
    def title(self) -> str:
        """Which call, head and query."""
        label, number = self.part.queries[self.query], (self.part.call.queries or range(self.query + 1))[self.query]
        named = f"query {number}" + (f": {label}" if label != str(number) else "")
        return f"{self.part.title}, head {self.part.heads[0]}, {named}"

    def listed(self, x: Any) -> Any:
        """Of S values those of the keys that are listed."""
        return x[list(self.keys)]


def query_row(trace: Trace, view: str, **where: Unpack[Where]) -> QueryRow:
    """One query; of more than 100 keys the 100 that weigh most, unless ``keys`` are given.

    Raises:
        SelectionError: no one call, head or query.
        FieldNotCaptured: scores or weights are not in the trace.
    """
    if where.get("queries") is None:
        where["queries"] = -1
    part = part_of_one_call(trace, view, **where)
    if len(part.heads) > 1:
        raise SelectionError(f"{view} draws one head; give heads= of {', '.join(map(str, part.heads))}.")
    if len(part.rows) > 1:
        raise SelectionError(f"{view} draws one query, and {len(part.rows)} are selected; give queries= with one.")
    i = part.rows[0]
    # Of this query alone: the other rows of a long call are many times as much.
    weights, scores = (part_array(part, name, i)[0, 0] for name in ("weights", "scores"))
    hidden = hidden_keys(part, i)
    keys, notes = part.columns, [UNKNOWN] if hidden is None else []
    if len(keys) > _MOST and where.get("keys") is None:
        heaviest = np.argsort(-np.abs(weights), kind="stable")[:_MOST]
        notes = [*notes, f"the {_MOST} keys of {len(keys)} that weigh most"]
        keys = tuple(sorted(int(j) for j in heaviest))
    return QueryRow(part, i, keys, None if hidden is None else hidden[0, 0], scores, weights, tuple(notes))


def label_keys(figure: Figure, x: float, y: float, found: QueryRow, room: float | None) -> None:
    """A label for each key, ending at ``x``; the first key begins at ``y`` (inches)."""
    for n, (label, j) in enumerate(zip(found.labels(room), found.keys, strict=True)):
        away = found.hidden is not None and bool(found.hidden[j])
        at = y + (n + 0.5) * found.spacing
        colour = {"color": FAINT} if away else {}
        text_at(figure, x, at, label, ha="right", va="center", fontsize=font_size(found.spacing), **colour)


def key_label_width(found: QueryRow, room: float | None) -> float:
    """Inches that :func:`label_keys` takes."""
    return label_width(found.labels(room), found.spacing)


def key_axes(figure: Figure, x: float, y: float, width: float, found: QueryRow, title: str) -> Axes:
    """Axes with a row for each key, the first on top."""
    axes = axes_at(figure, x, y, width, found.height)
    hide_frame(axes)
    axes.set_ylim(len(found.keys) - 0.5, -0.5)
    text_at(figure, x, y - 0.05, title, va="bottom", fontsize=6.8)
    return axes


def draw_bars(axes: Axes, found: QueryRow, values: Array, name: str, colour: str) -> None:
    """A bar and a number for each key, with as many digits as tell them apart; a masked one is hatched instead.

    Args:
        axes: of :func:`key_axes`.
        found: the row.
        values: S.
        name: of the bars.
        colour: of the bars.
    """
    listed = found.listed(values)
    seen = np.isfinite(listed) & ~_hidden_flags(found)
    low, high = min(0.0, *listed[seen], 0.0), max(0.0, *listed[seen], 1e-9)
    digits = _digits(listed[seen])
    size = max(SMALLEST, font_size(found.spacing) * 0.85)
    numbers = [f"{value:z.{digits}f}" for value in listed]
    # Numbers stand beyond the ends of the bars, so that the axis is longer than the bars by the width of a number.
    across = axes.get_position().width * axes.figure.get_figwidth()  # type: ignore[union-attr]
    widths = [text_width(text, size) for text in numbers]
    left_of, right_of = (max((w for w, v in zip(widths, listed, strict=True) if bool(v < 0) == below), default=0.0)
                         for below in (True, False))  # fmt: skip
    beside = [min(0.42, (wide + 0.04) / across) if wide else 0.0 for wide in (left_of * (low < 0), right_of)]
    span = (high - low) / (1 - sum(beside))
    left = low - span * beside[0]
    axes.set_xlim(left, left + span)
    made = axes.barh(np.arange(len(listed))[seen], listed[seen], height=0.72, color=colour, linewidth=0)
    for patch, j in zip(made, np.array(found.keys)[seen], strict=True):
        name_artist(patch, f"{name}-{j}")
    for n, value in enumerate(listed):
        if seen[n]:
            end = value if low < 0 or value >= 0 else 0.0
            side = "left" if value >= 0 else "right"
            gap = span * 0.012 * (1 if value >= 0 else -1)
            axes.text(end + gap, n, numbers[n], ha=side, va="center", fontsize=size)
        else:
            show_masked(axes.barh(n, span, left=left, height=0.9)[0])
    if low < 0:
        axes.axvline(0, color=FAINT, linewidth=0.4)


def _digits(values: Array) -> int:
    """How many digits after the point give the largest number two that count: two at the least, four at the most."""
    top = float(np.abs(values).max(initial=0.0))
    return 2 if top == 0 else max(2, min(4, 1 - math.floor(math.log10(top))))


def _hidden_flags(found: QueryRow) -> Flags:
    size = len(found.keys)
    return np.zeros(size, bool) if found.hidden is None else np.asarray(found.listed(found.hidden))
