"""Colours: for heads, told apart by every kind of colour vision, and for values."""

from __future__ import annotations

INK, FAINT, GRID, PAPER = "#1f2933", "#52606d", "#cbd2d9", "#ffffff"
MASKED, HATCH, MAY = "#eceff1", "#b0b8c0", "#4a7fb5"
SCORE, WEIGHT, SINK = "#8a94a0", "#2f6db3", "#8e0152"
ALARM = "#b42318"

# Chosen by search for the largest least distance (CIELAB) between any two, as seen with normal vision and with each of
# the three kinds of dichromacy (Machado et al. 2009); each has a contrast of 3 or more on white.
HEADS = ("#332288", "#ee6677", "#117733", "#5b8ff9", "#8e0152", "#999933", "#000000", "#aa4499")
# After the colours are used up, they come again with the next of these: on, off, … in line widths.
DASHES: tuple[tuple[float, ...], ...] = ((), (3.0, 1.2), (1.0, 1.0), (5.0, 1.2, 1.0, 1.2))

SEQUENTIAL = "Blues"
DIVERGING = "PuOr_r"


def head_style(n: int) -> tuple[str, tuple[float, ...]]:
    """Colour and dashes of the n-th line of a figure; the first 32 are all different.

    Args:
        n: its place among the heads that are drawn, from 0.
    """
    return HEADS[n % len(HEADS)], DASHES[n // len(HEADS) % len(DASHES)]
