"""Pictures of traces: figures for papers, interactive ones, and the viewer. Nothing is imported unasked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..optional import imported_when_asked
from .figures import VIEWS

if TYPE_CHECKING:  # What type checkers and editors see; _MODULES says the same to Python.
    from .figures.atlas_figure import atlas as atlas
    from .figures.distance_figure import distance as distance
    from .figures.heads_figure import heads as heads
    from .figures.heatmap_figure import heatmap as heatmap
    from .figures.layers_figure import layers as layers
    from .figures.lens_figure import lens as lens
    from .figures.neuron_figure import neuron as neuron
    from .html_page import page as page
    from .html_page import save_page as save_page
    from .notebook import show as show
    from .plotly_figures import plotly as plotly
    from .server import serve as serve
    from .widget import Widget as Widget

# Public name → its module, which is imported when the name is first asked for: each needs a library of its own.
_MODULES = {
    **{view.function: view.module for view in VIEWS.values()},
    "atlas": f"{__name__}.figures.atlas_figure",  # of a table and no trace, so that it is no view
    "page": f"{__name__}.html_page",
    "save_page": f"{__name__}.html_page",
    "plotly": f"{__name__}.plotly_figures",
    "serve": f"{__name__}.server",
    "show": f"{__name__}.notebook",
    "Widget": f"{__name__}.widget",
}

__all__ = list(_MODULES)

__getattr__ = imported_when_asked(__name__, _MODULES)


def __dir__() -> list[str]:
    return __all__
