"""Pictures of traces: figures for papers, interactive ones, and the viewer. Nothing is imported unasked."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..optional import extra_named

if TYPE_CHECKING:
    from .figures import distance, heads, heatmap, layers, lens, neuron
    from .html_page import page, save_page
    from .notebook import show
    from .plotly_figures import plotly
    from .server import serve
    from .widget import Widget

_WHERE = {
    **dict.fromkeys(("distance", "heads", "heatmap", "layers", "lens", "neuron"), ".figures"),
    **dict.fromkeys(("page", "save_page"), ".html_page"),
    "plotly": ".plotly_figures",
    "serve": ".server",
    "show": ".notebook",
    "Widget": ".widget",
}

__all__ = [
    "Widget",
    "distance",
    "heads",
    "heatmap",
    "layers",
    "lens",
    "neuron",
    "page",
    "plotly",
    "save_page",
    "serve",
    "show",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; there are {', '.join(__all__)}.")
    with extra_named():
        return getattr(import_module(_WHERE[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
