"""Colour maps and ranges, and what stands for a masked entry."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.patches import Patch

from ..palette import DIVERGING, HATCH, MASKED, MAY, SEQUENTIAL
from ..values import FLOOR


def colours(data: np.ma.MaskedArray[Any, Any], field: str, scale: str) -> tuple[Colormap, Normalize]:
    """Colour map and range: weights from 0 to 1, scores about 0, what may be attended to in one."""
    if field == "mask":
        return ListedColormap([MAY]), Normalize(0, 1)
    if field == "scores":
        finite = np.ma.masked_invalid(data).compressed()
        top = float(np.abs(finite).max()) if finite.size else 1.0
        return matplotlib.colormaps[DIVERGING], Normalize(-(top or 1.0), top or 1.0)
    return matplotlib.colormaps[SEQUENTIAL], LogNorm(FLOOR, 1, clip=True) if scale == "log" else Normalize(0, 1)


def show_masked(patch: Patch) -> None:
    """Hatch what no value covers: the background of a picture, or what stands for a masked entry."""
    patch.set(facecolor=MASKED, hatch="//////", edgecolor=HATCH, linewidth=0)
