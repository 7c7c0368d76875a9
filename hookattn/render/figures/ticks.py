"""Token labels along an axis: as large as their spacing allows, and fewer where there is no room for all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from matplotlib.axes import Axes

from ...tokens.display import shortened
from .fitting import text_width

LARGEST, SMALLEST = 7.5, 6.0
"""Points. What is smaller than the second can't be read on paper."""
LONGEST = 16
_LEADING = 1.05
_POINT = 1 / 72


def font_size(spacing: float) -> float:
    """Points, for labels that are ``spacing`` inches apart."""
    return min(LARGEST, max(SMALLEST, spacing / _POINT / _LEADING))


def stride(spacing: float) -> int:
    """Every how manieth label fits."""
    return max(1, math.ceil(SMALLEST * _LEADING * _POINT / spacing - 1e-6))


def label_width(labels: Sequence[str], spacing: float) -> float:
    """Inches that the longest of the labels takes, at the size that they will have."""
    if not labels:
        return 0.0
    return max(text_width(shortened(label, LONGEST), font_size(spacing)) for label in labels) + 0.08


def short_labels(labels: Sequence[str], spacing: float, most: float | None = None) -> list[str]:
    """Labels of at most 16 characters, and of at most ``most`` inches at the size that they will have."""
    made = [shortened(label, LONGEST) for label in labels]
    if most is None:
        return made
    size = font_size(spacing)
    for i, label in enumerate(made):
        length = len(label)
        while length > 2 and text_width(made[i], size) > most:
            length -= 1
            made[i] = shortened(label, length)
    return made


def label_axis(axes: Axes, which: Literal["x", "y"], labels: Sequence[str], spacing: float, shown: bool = True) -> None:
    """Ticks at 0, 1, … with a label each, or with every n-th.

    Args:
        axes: where.
        which: the axis.
        labels: one for each position.
        spacing: inches between two positions.
        shown: whether there are labels, or only the axis without any.
    """
    every = _every(which, labels, spacing)
    at = list(range(0, len(labels), every)) if shown else []
    texts = [shortened(labels[i], LONGEST) for i in at]
    axis = axes.xaxis if which == "x" else axes.yaxis
    turned = {"rotation": 90} if which == "x" and _turned(labels, spacing) else {}
    axis.set_ticks(at, texts, fontsize=font_size(spacing), **turned)  # type: ignore[arg-type,unused-ignore]
    axis.set_tick_params(length=1.5 if every > 1 and shown else 0, pad=2)


def _every(which: Literal["x", "y"], labels: Sequence[str], spacing: float) -> int:
    """Every how manieth label is shown."""
    every = stride(spacing)
    if not labels[0].isdigit():
        return every
    # Positions: round steps, and upright as long as there are enough of them.
    if which == "x":
        every = max(every, math.ceil(label_width(labels, spacing) / spacing - 1e-6))
    steps: Iterator[int] = (n * 10**k for k in range(9) for n in (1, 2, 5))
    return next(n for n in steps if n >= every)


def _turned(labels: Sequence[str], spacing: float) -> bool:
    """Whether labels below an axis stand upright on their ends."""
    return not labels[0].isdigit() and label_width(labels, spacing) > spacing


def label_depth(labels: Sequence[str], spacing: float) -> float:
    """Inches that the labels below an axis take."""
    return label_width(labels, spacing) if _turned(labels, spacing) else font_size(spacing) * _POINT * 1.6
