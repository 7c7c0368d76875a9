"""How wide a figure is: exactly as wide as it is asked to be, with all that it draws inside."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.text import Text

from ... import checks
from ...errors import RenderError, SelectionError
from ...printable import printable

Width = Literal["column", "page"] | float | None

WIDTHS = {"column": 3.3, "page": 7.0}
"""Inches of one column of a paper set in two, and of both."""
_PAD = 0.04
_TRIES = 8
_DOTS = 720
"""Dots an inch that text is measured with."""


def width_in_inches(width: Any) -> float | None:
    """Inches of a ``width=``; None: as wide as the figure likes.

    Raises:
        SelectionError: neither one of :data:`WIDTHS` nor a number of inches from 1 to 100.
    """
    if width is None:
        return None
    if isinstance(width, str):
        if width not in WIDTHS:
            known = ", ".join(f"{name!r} ({inches:g} in)" for name, inches in WIDTHS.items())
            raise checks.wrong("width", width, f"{known}, or inches", SelectionError)
        return WIDTHS[width]
    return checks.number("width", width, "'column', 'page', or inches from 1 to 100", lambda x: 1 <= x <= 100)


def title_of(title: Any, usual: str) -> str:
    """The line above a figure: the usual one, none (False), or a text.

    Raises:
        InputError: ``title`` is neither a text nor True or False.
    """
    if isinstance(title, bool):
        return usual if title else ""
    return checks.text("title", title, "a text, True (what is drawn) or False (none)")


def fitted(width: float | None, draw: Callable[[float | None], Figure]) -> Figure:
    """A figure with all that it draws inside, and, where a width is asked for, exactly that wide.

    What a view takes in room is an estimate, since nobody knows how wide a label is before it is set. So the view is
    drawn, measured, and drawn again in less room where it was too wide.

    Args:
        width: inches; None: as wide as what is drawn.
        draw: draws the view in so many inches, or as it likes.

    Raises:
        RenderError: it can't be made so narrow; says how wide it is at the least.
    """
    room, narrowest = width, math.inf
    for _ in range(_TRIES):
        figure = draw(room)
        left, top, right, bottom = _ink(figure)
        across = right - left + 2 * _PAD
        if width is None or across <= width + 1e-6:
            # What there is to spare is on the right, as in a text.
            wide = across if width is None else width
            kept = max(0.0, min(left - _PAD, right + _PAD - wide if right + _PAD > wide else 0.0))
            shift = _PAD - left if width is None or left < _PAD else -kept
            _move(figure, shift, _PAD - top, wide, bottom - top + 2 * _PAD)
            return figure
        narrowest = min(narrowest, across)
        assert room is not None
        room -= across - width + 0.01
        if room < 0.3:
            break
    raise RenderError(
        f"the figure can't be {width:g} in wide: it takes {math.ceil(narrowest * 10) / 10:g} in; give it more, or draw "
        "less (heads=, queries=, keys=)."
    )


def _ink(figure: Figure) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what is drawn, in inches from the upper left corner of the figure."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a token such as $x$ is what it says
        text.set_text(printable(text.get_text(), keep="\n"))  # and a control character is no part of an SVG
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that no font has: it is said when the figure is saved
        canvas: Any = figure.canvas if isinstance(figure.canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)
        box = figure.get_tightbbox(canvas.get_renderer())
    height = figure.get_figheight()
    return box.x0, height - box.y1, box.x1, height - box.y0


def _move(figure: Figure, right: float, down: float, width: float, height: float) -> None:
    """Make a figure of this size of one whose parts all keep their size, and are moved by so many inches."""
    w, h = figure.get_size_inches()

    def x_of(x: float) -> float:
        return float((x * w + right) / width)

    def y_of(y: float) -> float:
        return float(1 - ((1 - y) * h + down) / height)

    for axes in figure.axes:
        at = axes.get_position(original=True)
        axes.set_position((x_of(at.x0), y_of(at.y0), at.width * w / width, at.height * h / height))
    for text in figure.texts:
        x, y = text.get_position()
        text.set_position((x_of(x), y_of(y)))
    for line in (*figure.artists, *figure.lines):
        if isinstance(line, Line2D):
            xs, ys = np.asarray(line.get_data(), float)
            line.set_data([x_of(float(x)) for x in xs], [y_of(float(y)) for y in ys])
    figure.set_size_inches(width, height)


@functools.lru_cache(maxsize=1 << 14)
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Inches that a line of text takes, in the font of all figures; ``size`` in points."""
    font = FontProperties(family=matplotlib.rcParams["font.family"], size=size, weight=weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        width, _, _ = _renderer().get_text_width_height_descent(printable(text), font, ismath=False)
    return float(width) / _DOTS


@functools.cache
def _renderer() -> Any:
    made: Any = RendererAgg
    return made(1, 1, _DOTS)


def wrapped(text: str, width: float, size: float, weight: str = "normal") -> str:
    """Text in lines that are at most so many inches wide; a word that is longer is broken."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if text_width(longer, size, weight) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and text_width(lines[-1] + character, size, weight) > width:
                lines.append("")
            lines[-1] += character
    return "\n".join(lines)
