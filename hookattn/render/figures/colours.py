"""Colour maps and ranges, and what stands for a masked entry."""

from __future__ import annotations

from typing import NamedTuple

import matplotlib
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.patches import Patch

from ..palette import DIVERGING, HATCH, MASKED, MAY, SEQUENTIAL
from ..values import FLOOR

# What rounding may make of a weight of 1.
_ROUNDED = 1.01


class ColourScale(NamedTuple):
    """Which colour each value has.

    Attributes:
        map: the colours.
        norm: from a value to its place among them.
    """

    map: Colormap
    norm: Normalize


def colour_scale(largest: float, field: str, scale: str, negative: bool = False) -> ColourScale:
    """Colours of values up to this magnitude: weights from 0 to 1, or to the largest where that is more; scores, and
    weights that some normalizers make negative, about 0; what may be attended to in one."""
    if field == "mask":
        return ColourScale(ListedColormap([MAY]), Normalize(0, 1))
    if field == "scores" or negative:
        return ColourScale(matplotlib.colormaps[DIVERGING], Normalize(-(largest or 1.0), largest or 1.0))
    top = largest if largest > _ROUNDED else 1.0
    norm = LogNorm(FLOOR, top, clip=True) if scale == "log" else Normalize(0, top)
    return ColourScale(matplotlib.colormaps[SEQUENTIAL], norm)


def show_masked(patch: Patch) -> None:
    """Hatch what no value covers: the background of a picture, or what stands for a masked entry."""
    patch.set(facecolor=MASKED, hatch="//////", edgecolor=HATCH, linewidth=0)
