"""Colour maps and ranges, and what stands for a masked entry."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap, LogNorm, Normalize
from matplotlib.patches import Patch

from ..palette import DIVERGING_STOPS, HATCH, MASKED, MAY, SEQUENTIAL_STOPS
from ..values import FLOOR

SEQUENTIAL = LinearSegmentedColormap.from_list("hookattn-sequential", SEQUENTIAL_STOPS)
DIVERGING = LinearSegmentedColormap.from_list("hookattn-diverging", DIVERGING_STOPS)


class ColourScale(NamedTuple):
    """Which colour each value has.

    Attributes:
        map: the colours.
        norm: from a value to its place among them.
        clipped: whether anything is beyond the last colour.
    """

    map: Colormap
    norm: Normalize
    clipped: bool = False


def colour_scale(end: float, largest: float, field: str, scale: str, negative: bool = False) -> ColourScale:
    """Colours of values: weights from 0 to where their scale ends, scores, and weights that some normalizers make
    negative, about 0; what may be attended to in one.

    Args:
        end: where a linear scale of weights ends, see :func:`hookattn.render.scale.scale_end`.
        largest: the largest magnitude, at which all others do.
        field, scale: as a view takes them.
        negative: whether any weight is below 0.
    """
    if field == "mask":
        return ColourScale(ListedColormap([MAY]), Normalize(0, 1))
    if field == "scores" or negative:
        return ColourScale(DIVERGING, Normalize(-(largest or 1.0), largest or 1.0))
    if scale == "log":
        return ColourScale(SEQUENTIAL, LogNorm(FLOOR, max(largest, 10 * FLOOR), clip=True))
    return ColourScale(SEQUENTIAL, Normalize(0, end or 1.0), largest > end)


def show_masked(patch: Patch) -> None:
    """Hatch what no value covers: the background of a picture, or what stands for a masked entry."""
    patch.set(facecolor=MASKED, hatch="//////", edgecolor=HATCH, linewidth=0)
