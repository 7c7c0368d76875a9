"""Figures and pages of weights that are no softmax: negative, above 1, changed afterwards; and of guessed axes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

import hookattn
from hookattn import render
from hookattn.errors import SelectionError
from hookattn.render.page_size import narrowed
from hookattn.render.palette import LINE
from hookattn.render.values import block_maxima
from tests import tiny_models as tiny

T = 8


def traced(normalizer: str = "softmax", applied: bool = False) -> hookattn.Trace:
    """A trace of one layer of weights that this normalizer makes of random scores."""
    trace = hookattn.trace(tiny.gpt2(), {"input_ids": tiny.ids(T)})
    call = trace.select(layer=1)[0]
    scores = torch.randn(call.weights.shape, generator=torch.Generator().manual_seed(0)).masked_fill(
        ~call.mask, -torch.inf
    )
    weights = {
        "softmax": call.weights,
        "relu": 5 * scores.relu(),
        "differential": scores.softmax(-1) - 0.8 * (3 * scores).softmax(-1),
    }[normalizer]
    fields = {**call.fields, "weights": weights, "applied": 2 * weights if applied else None}
    own: dict[str, Any] = {"fields": fields, "normalizer": normalizer, "derivable": ()}
    if normalizer != "softmax":
        own |= {"score": "additive", "own_scores": True, "scale": None}
        fields |= {"q": None, "k": None, "scores": None}
    made = replace(call, **own)
    made.certificate = call.certificate
    return replace(trace, calls=[made])


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def meshes(figure: Figure) -> list[Any]:
    return figure.findobj(lambda artist: (artist.get_gid() or "").startswith("head-"))


def test_weights_below_0_are_coloured_about_0_and_those_above_1_to_the_largest() -> None:
    for normalizer, low in (("differential", -1), ("relu", 0)):
        trace = traced(normalizer)
        w = trace[0].weights[0]
        figure = render.heatmap(trace)
        norm = meshes(figure)[0].norm
        largest = float(w.abs().max())
        assert (norm.vmin, norm.vmax) == pytest.approx((low * largest, largest))
        drawn = np.ma.filled(meshes(figure)[2].get_array(), 0.0).reshape(T, T)
        assert torch.allclose(torch.tensor(drawn).float(), w[2], atol=1e-6)
        assert f"no softmax (normalizer {normalizer})" in texts(figure)
    assert meshes(render.heatmap(traced()))[0].norm.vmax == 1


def test_lines_are_as_opaque_as_weights_are_large_and_dotted_below_0() -> None:
    trace = traced("differential")
    w = trace[0].weights[0, 1]
    lines = render.heads(trace, heads=1).findobj(PathCollection)[0]
    assert len(lines.get_paths()) == int((w.abs() >= 0.01).sum())
    opacity = torch.tensor(lines.get_edgecolors())[:, 3]
    assert torch.allclose(opacity, w[w.abs() >= 0.01].abs().double().clamp(min=LINE["faintest"]), atol=1e-6)
    dotted = [style[1] is not None for style in lines.get_linestyles()]
    assert dotted == (w[w.abs() >= 0.01] < 0).tolist() and any(dotted)
    large = traced("relu")
    opacity = torch.tensor(render.heads(large, heads=1).findobj(PathCollection)[0].get_edgecolors())[:, 3]
    assert float(opacity.max()) == 1 and float(opacity.median()) < 0.9


def test_a_figure_says_which_weights_it_shows_and_offers_the_others() -> None:
    trace = traced(applied=True)
    w = trace[0].weights[0]
    for field, factor, said in (
        ("weights", 1, "as the softmax made them; field='applied'"),
        ("applied", 2, "as they met"),
    ):
        for draw in (render.heatmap, render.layers):
            assert any(said in text for text in texts(draw(trace, field=field))), (field, draw)
        drawn = np.ma.filled(meshes(render.heatmap(trace, field=field))[0].get_array(), 0.0).reshape(T, T)
        assert torch.allclose(torch.tensor(drawn).float(), factor * w[0], atol=1e-6)
    assert render.heads(trace, field="applied", heads=0)
    # Where nothing changed them, what met the values are the weights.
    plain = meshes(render.heatmap(traced(), field="applied"))[0].get_array()
    assert np.ma.allequal(plain, meshes(render.heatmap(traced()))[0].get_array())


def test_the_largest_of_a_block_is_what_is_farthest_from_0() -> None:
    x = np.ma.masked_array([[[0.1, -0.9], [0.2, 0.3]]], [[[0, 0], [0, 1]]])
    assert block_maxima(x, 1, far=True)[0].tolist() == [[[-0.9]]]
    assert block_maxima(x, 1)[0].tolist() == [[[0.2]]]
    assert block_maxima(np.ma.masked_all((1, 2, 2)), 1, far=True)[0].mask.all()


def test_views_of_a_softmax_or_of_products_say_why_they_have_nothing_to_draw() -> None:
    trace = traced("relu")
    trace[0].fields["scores"] = torch.randn(trace[0].weights.shape)
    with pytest.raises(SelectionError, match=r"why a softmax makes its weights.*'relu'"):
        render.lens(trace, heads=0)
    with pytest.raises(SelectionError, match=r"product of a query and a key.*'additive'"):
        render.neuron(trace, heads=0)


def test_a_mean_below_0_is_on_the_axis() -> None:
    trace = traced("differential")
    axes = render.distance(trace).axes[0]
    least = min(float(np.nanmin(line.get_ydata())) for line in axes.lines)
    assert least < 0 and axes.get_ylim()[0] < least


def test_a_guess_stands_beside_what_is_drawn() -> None:
    trace = traced()
    trace[0].basis = {"B": "followed", "H": "guessed", "T": "guessed", "S": "followed", "G": "followed"}
    for draw in (render.heatmap, render.layers, render.distance, render.heads):
        assert any("axes guessed: H T" in text for text in texts(draw(trace))), draw
    assert "axes guessed: H T" in render.plotly(trace).layout.title.text


def test_plotly_has_the_range_of_the_weights() -> None:
    pytest.importorskip("plotly")
    for normalizer, low in (("differential", -1), ("relu", 0), ("softmax", 0)):
        trace = traced(normalizer)
        largest = 1.0 if normalizer == "softmax" else float(trace[0].weights[0].abs().max())
        axis = render.plotly(trace).layout.coloraxis
        assert (axis.cmin, axis.cmax) == pytest.approx((low * largest, largest))


def test_a_page_narrows_no_weight_that_8_bits_do_not_hold_and_says_what_there_is_none_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hookattn.render.page_size.ROOM", 1)
    for normalizer in ("differential", "relu"):
        trace = traced(normalizer, applied=True)
        made = narrowed(trace, fields=("weights", "applied", "mask", "v"))
        call = made.trace[0]
        for name in ("weights", "applied"):
            found, own = call.get(name), trace[0].get(name)
            assert found is not None and own is not None and found.dtype == torch.float16
            torch.testing.assert_close(found.float(), own, rtol=1e-3, atol=1e-3)
        assert call.fields["q"] is call.fields["k"] is call.fields["scores"] is None
    assert json.dumps(made.notes)
