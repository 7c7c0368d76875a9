"""Every figure of hookattn.render, as wide as a column and as a page, of the demo's trained model.

    python examples/gallery.py FOLDER [svg|png|pdf]

A file for each figure and width: ``heatmap-column.svg``, ``heatmap-page.svg``, … ``plotly`` writes a page.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hookattn
from hookattn import render
from hookattn.demo.induction import example_tokens, load_pretrained

WIDTHS = ("column", "page")
# The name of a file → the figure, and what of the trace it draws.
FIGURES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "atlas": (render.atlas, {}),
    "heatmap": (render.heatmap, {"layer": 1, "heads": 2}),
    "heatmap-scores": (render.heatmap, {"layer": 1, "heads": 2, "field": "scores"}),
    "heatmap-heads": (render.heatmap, {"layer": 0}),
    "heads": (render.heads, {"layer": 1, "heads": [1, 2]}),
    "layers": (render.layers, {}),
    "distance": (render.distance, {}),
    "neuron": (render.neuron, {"layer": 1, "heads": 2, "keys": range(20, 35)}),
    "lens": (render.lens, {"layer": 1, "heads": 2, "keys": range(20, 35)}),
}


def demo_trace() -> hookattn.Trace:
    """A sequence that is repeated, so that its second half can be copied from the first."""
    ids = example_tokens(0)
    return hookattn.trace(load_pretrained(), ids, tokens=[list(map(str, row)) for row in ids.tolist()])


def draw(folder: Path, kind: str = "svg") -> list[Path]:
    """Write all figures, and say which files these are."""
    folder.mkdir(parents=True, exist_ok=True)
    trace, written = demo_trace(), []
    for name, (figure, options) in FIGURES.items():
        for width in WIDTHS:
            path = folder / f"{name}-{width}.{kind}"
            figure(trace, width=width, **options).savefig(path)
            written.append(path)
    page = folder / "plotly.html"
    render.plotly(trace, layer=1).write_html(page, include_plotlyjs=True)
    return [*written, page]


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1]), *sys.argv[2:3]):
        print(path)
