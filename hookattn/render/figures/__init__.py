"""Figures of matplotlib, one view a file, and the list of them."""

from __future__ import annotations

from .distance import distance
from .heads import heads
from .heatmap import heatmap
from .layers import layers
from .lens import lens
from .neuron import neuron

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
