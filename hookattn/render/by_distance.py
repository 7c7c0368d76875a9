"""Mean weights at each distance from the query, and how high an axis they need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..calls.part import Part
from ..errors import SelectionError
from .values import UNKNOWN, Array, drawn_values, notes_on_weights


def mean_by_distance(part: Part) -> tuple[Array, Array]:
    """The distances there are, and H × distances: the mean weight at each; NaN where the mask allows none.

    Raises:
        SelectionError: queries and keys are not places in one sequence.
    """
    if part.places is None:
        raise SelectionError(f"{part.title} has no distances: its queries and keys are places in different sequences.")
    # Distances are counted from 0 on, so that bincount sums the weights and the entries of each in one pass.
    gaps = np.array(part.places)[list(part.rows)][:, None] - np.array(part.columns)[None]
    first, last = int(gaps.min()), int(gaps.max())
    flat = (gaps - first).ravel()
    size = last - first + 1
    found = (drawn_values(one).data[0] for one in part.each_head())
    sums = [(np.bincount(flat, x.filled(0.0).ravel(), size), np.bincount(flat, ~np.ma.getmaskarray(x).ravel(), size))
            for x in found]  # fmt: skip
    total, count = (np.array(x) for x in zip(*sums, strict=True))
    with np.errstate(invalid="ignore"):
        means = np.where(count > 0, total / count, np.nan)
    there = np.flatnonzero((count > 0).any(0))
    keep = slice(there[0], there[-1] + 1) if len(there) else slice(0, 1)
    return np.arange(first, last + 1)[keep].astype(float), means[:, keep]


def highest(curves: Sequence[tuple[Array, Array]]) -> float:
    """Where the axis of the weights ends: a little above the largest mean of all panels."""
    return 1.05 * max(float(np.nanmax(means, initial=0.01)) for _, means in curves)


def lowest(curves: Sequence[tuple[Array, Array]], top: float) -> float:
    """Where the axis begins: a little below 0, or below the least mean where weights are negative."""
    least = min(float(np.nanmin(means, initial=0.0)) for _, means in curves)
    return min(-0.02 * top, 1.05 * least)


def notes_of(parts: Sequence[Part]) -> list[str]:
    """What a reader of the means has to know."""
    return [
        note
        for part in parts
        for note in (*([] if part.call.has("mask") else [UNKNOWN]), *notes_on_weights(part, "weights"))
    ]
