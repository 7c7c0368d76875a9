"""Where the colours of weights end; the viewer has the same rule in ``viewer/src/scale.ts``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

KEYS, ROWS, QUANTILE, UNIFORM = 8, 8, 0.75, 4.0
"""Rows of at most so many keys do not count; with fewer rows than these that do, the largest weight is the end; the
quantile of the rows' largest; how many times the weight of a uniform head the end is at the least."""


def scale_end(weights: Any, first: int | None = None) -> float:
    """The weight at which a linear colour scale of one head ends; what is larger has the last colour.

    The largest weight would do where heads are sharp. But in a causal head it is always the 1 of the first query,
    beside which a diffuse head is blank. So the end is the 0.75 quantile of the largest weights of those rows that have
    more than a few keys. The quantile is over rows, not entries: of a sharp head of 2,048 tokens all but one entry in a
    thousand is noise, and a quantile of entries would draw noise as strong as attention.

    Args:
        weights: rows columns, of one head; masked (``numpy.ma``) or NaN where no attention is allowed.
        first: the first key, where heads rest attention that has nowhere to go: it counts in no row's largest. None: it
            is left out, or is not known.

    Returns:
        At least four times what a uniform head would give each key, so that one stays pale; rounded up to two
        digits, unless it is the largest weight. The largest where there are few rows, or where it is less than twice
        the quantile. 0 where nothing is finite.
    """
    values = np.abs(np.ma.filled(np.ma.asarray(weights).astype(float), np.nan))
    values[~np.isfinite(values)] = np.nan
    there = ~np.isnan(values)
    largest = float(values[there].max(initial=0.0))
    counted = values[there.sum(1) > KEYS]
    if len(counted) < ROWS:
        return largest
    total = np.nansum(counted, 1).sum()
    if first is not None:
        counted = counted.copy()
        counted[:, first] = 0.0
    maxima = np.sort(np.nanmax(counted, 1))
    end = float(maxima[math.floor(QUANTILE * (len(maxima) - 1))])
    end = largest if end >= largest / 2 else end
    end = max(end, float(UNIFORM * total / len(counted) / values.shape[1]))
    return end if end == largest else _rounded_up(end)


def _rounded_up(x: float) -> float:
    """To two significant digits."""
    if x <= 0:
        return x
    step: float = 10.0 ** (math.floor(math.log10(x)) - 1)
    # What a division makes of two digits may be a little more than they are.
    return math.ceil(x / step - 1e-9) * step
