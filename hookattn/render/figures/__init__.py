"""Figures of matplotlib, one view a file, and the list of them."""

from __future__ import annotations

from .distance_figure import distance
from .heads_figure import heads
from .heatmap_figure import heatmap
from .layers_figure import layers
from .lens_figure import lens
from .neuron_figure import neuron

# By the names that the viewer has for its views.
VIEWS = {
    "matrix": heatmap,
    "head": heads,
    "model": layers,
    "neuron": neuron,
    "lens": lens,
    "distance": distance,
}

__all__ = ["VIEWS", "distance", "heads", "heatmap", "layers", "lens", "neuron"]
