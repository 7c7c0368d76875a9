"""Figures of matplotlib, one a file, and the one list of them.

:mod:`hookattn.render` and ``hookattn render --view`` follow the list. It names the functions and does not import them:
matplotlib is heavy, and whoever asks for the names alone (``hookattn render --help``) does not need it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FigureView(NamedTuple):
    """A view that is drawn as a figure.

    Attributes:
        function: its name in :mod:`hookattn.render`; it stands in ``<function>_figure.py``.
        in_pages: whether the viewer has this view too, so that a page can open with it.
    """

    function: str
    in_pages: bool = True

    @property
    def module(self) -> str:
        """The module of the function."""
        return f"{__name__}.{self.function}_figure"

    @property
    def draw(self) -> Callable[..., Figure]:
        """The function; matplotlib is imported for it."""
        found: Any = getattr(import_module(self.module), self.function)
        return found  # type: ignore[no-any-return]


# By the names that the viewer has for its views.
VIEWS = {
    "matrix": FigureView("heatmap"),
    "head": FigureView("heads"),
    "model": FigureView("layers"),
    "neuron": FigureView("neuron"),
    "lens": FigureView("lens"),
    "distance": FigureView("distance", in_pages=False),
}
