"""Colours: for heads, told apart by every kind of colour vision, and for values.

What figures and the viewer share stands in ``palette.json``, which both read.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

_SHARED: dict[str, Any] = json.loads(files(__package__).joinpath("palette.json").read_text("utf-8"))

INK, FAINT, GRID, PAPER = "#1f2933", "#52606d", "#cbd2d9", "#ffffff"
MASKED, HATCH, MAY = str(_SHARED["masked"]["light"]), str(_SHARED["hatch"]["light"]), "#4a7fb5"
SCORE, WEIGHT, SINK = "#8a94a0", "#2f6db3", "#8e0152"
ALARM = "#b42318"

# Chosen by search for the largest least distance (CIELAB) between any two, as seen with normal vision and with each of
# the three kinds of dichromacy (Machado et al. 2009); each has a contrast of 3 or more on white.
HEADS: tuple[str, ...] = tuple(_SHARED["heads"]["light"])
# After the colours are used up, they come again with the next of these: on, off, … in line widths.
DASHES: tuple[tuple[float, ...], ...] = tuple(tuple(map(float, dash)) for dash in _SHARED["dashes"])

SEQUENTIAL_STOPS: tuple[str, ...] = tuple(_SHARED["sequential"]["light"])
"""Stops of a ramp from nothing to much, evenly apart."""
DIVERGING_STOPS: tuple[str, ...] = tuple(_SHARED["diverging"]["light"])
"""Stops of a ramp from negative by zero to positive, evenly apart."""
LINE: dict[str, float] = _SHARED["line"]
"""How a weight is drawn as a line: see ``strength`` and ``Lines`` of the viewer. ``bend``: how far its control points
are from its ends, in parts of its width; ``thinnest``, ``thickest``: pixels; ``faintest``: its least opacity."""


def head_style(head: int) -> tuple[str, tuple[float, ...]]:
    """Colour and dashes of a head, the same whichever others are drawn; those of the first 32 are all different.

    Args:
        head: its number in the model.
    """
    return HEADS[head % len(HEADS)], DASHES[head // len(HEADS) % len(DASHES)]


# As the viewer has them (--r0 and on in its style.css, in the order of ALL in its roles.ts), the most telling first.
ROLES: dict[str, str] = {
    "induction": "#d1495b",
    "duplicate token": "#e07b1a",
    "same word in the other sentence": "#b8860b",
    "previous token": "#2b6cb0",
    "next token": "#2a9db5",
    "itself": "#2f8f4e",
    "neighbours": "#7a9a2e",
    "separators": "#8457b8",
    "first token": "#c05299",
    "learned sink": "#8c5a3c",
    "uniform": "#7b8794",
}
NO_ROLE = "no clear role"


def role_colour(role: str) -> str:
    """The hue of a role of heads; a role of somebody else's has that of the last."""
    return ROLES.get(role, ROLES["uniform"])
