"""A figure says that what it draws was edited, and by what."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hookattn
from hookattn import edit
from tests import tiny_models as tiny

pytest.importorskip("matplotlib")

from matplotlib.text import Text

from hookattn import render


def traced(*edits: hookattn.edit.Edit) -> hookattn.Trace:
    with torch.no_grad():
        return hookattn.edited(tiny.gpt2(), {"input_ids": torch.arange(3, 10)[None]}, *edits)


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


ZERO = edit.zero("weights", layer=0, heads=[1], keys=[0, 2])
EDGE = edit.knockout(layer=1, heads=[2], queries=[5], keys=[1])


@pytest.mark.parametrize("view", ["heatmap", "heads", "lens", "neuron", "layers", "distance"])
def test_every_figure_says_it(view: str) -> None:
    trace = traced(ZERO, EDGE)
    draw = getattr(render, view)
    if view in ("layers", "distance"):
        assert any("layer 0 edited: zero(weights) head 1, key 0 2" in text for text in texts(draw(trace)))
        assert any("layer 1 edited: knockout(mask) head 2, query 5, key 1" in text for text in texts(draw(trace)))
    else:
        where = {"layer": 0, "heads": 1}
        assert "edited: zero(weights) head 1, key 0 2" in texts(draw(trace, **where))


def test_none_says_it_of_a_clean_one() -> None:
    with torch.no_grad():
        trace = hookattn.trace(tiny.gpt2(), {"input_ids": torch.arange(3, 10)[None]})
    assert not [text for text in texts(render.layers(trace)) if "edited" in text]


def test_the_lens_does_not_explain_what_an_edit_has_set() -> None:
    trace = traced(ZERO)
    words = [
        t for t in texts(render.lens(trace, layer=0, heads=1)) if t in ("edited", "attended", "outscored", "drained")
    ]
    assert words[0] == words[2] == "edited" and "edited" not in (words[1], *words[3:])
    assert "edited" not in texts(render.lens(trace, layer=0, heads=2))


def test_plotly_says_it() -> None:
    pytest.importorskip("plotly")
    for view in ("matrix", "model", "distance"):
        where: dict[str, Any] = {"layer": 0} if view == "matrix" else {}
        assert "edited: zero(weights) head 1, key 0 2" in render.plotly(traced(ZERO), view, **where).layout.title.text
