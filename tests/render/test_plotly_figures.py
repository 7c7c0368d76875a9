"""Figures of plotly: their data against the call."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("plotly")
pytest.importorskip("transformers")

import numpy as np

import hookattn
from hookattn import render
from hookattn.errors import FieldNotCaptured, SelectionError
from tests import tiny_models as tiny

TOKENS = ["</script><img>", "$x$", "&amp;", "Ġcat", "ĠÃ©", "s"]
LABELS = ["&lt;/script&gt;&lt;img&gt;", "&#36;x&#36;", "&amp;amp;", "cat", "é", "…s"]


def traced(**options: Any) -> hookattn.Trace:
    return hookattn.trace(tiny.gpt2(), tiny.ids(6), tokens=[TOKENS] * 2, **options)


def test_matrix_has_the_weights() -> None:
    trace = traced()
    call = trace[1]
    figure = render.plotly(trace, layer=1, heads=[3, 1], batch=1)
    assert [t.name for t in figure.data] == ["head 3", "head 1"]
    for heat, head in zip(figure.data, (3, 1), strict=True):
        expected = call.weights[1, head].double().masked_fill(~call.mask.expand_as(call.weights)[1, head], torch.nan)
        assert np.array_equal(heat.z, expected.numpy(), equal_nan=True)
        assert heat.text[3][0] == f"query {LABELS[3]}<br>key {LABELS[0]}"
    assert list(figure.layout.xaxis.ticktext) == list(figure.layout.yaxis.ticktext) == LABELS
    assert figure.layout.yaxis.autorange == "reversed" and figure.layout.title.text == "decoder layer 1"
    json.loads(figure.to_json())


def test_logarithmic_colours_and_exact_numbers() -> None:
    trace = traced()
    heat = render.plotly(trace, layer=0, heads=0, scale="log").data[0]
    weights = trace[0].weights[0, 0].double().numpy()
    lower = np.tril(np.ones((6, 6), bool))
    assert np.array_equal(np.array(heat.customdata)[lower], weights[lower])
    assert np.allclose(np.array(heat.z)[lower], np.log10(np.maximum(weights, 1e-4))[lower])


def test_model_has_every_head() -> None:
    figure = render.plotly(traced(), "model", field="scores")
    assert [t.name for t in figure.data][:2] == ["decoder layer 0, head 0", "decoder layer 0, head 1"]
    assert len(figure.data) == 8
    top = max(np.nanmax(np.abs(t.z)) for t in figure.data)
    assert figure.layout.coloraxis.cmax == top == -figure.layout.coloraxis.cmin


def test_distance_has_every_head() -> None:
    trace = traced()
    figure = render.plotly(trace, "distance")
    line = next(t for t in figure.data if t.name == "head 2" and t.xaxis == "x2")
    assert np.allclose(line.y, [trace[1].weights[0, 2].diagonal(-d).mean().item() for d in range(6)])
    assert sum(t.showlegend for t in figure.data) == 4
    highest = max(t.y.max() for t in figure.data)
    assert highest < figure.layout.yaxis.range[1] < 1.2 * highest


def test_errors() -> None:
    with pytest.raises(SelectionError, match="view='pie': expected one of matrix, model, distance"):
        render.plotly(traced(), "pie")  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="have no meaning in the distance view"):
        render.plotly(traced(), "distance", field="scores")
    with pytest.raises(FieldNotCaptured, match="trace again with capture="):
        render.plotly(traced(capture="mask"), layer=0)


def test_a_path_is_text() -> None:
    """Plotly reads tags, links and placeholders in titles; what a path has of them is shown as it is."""
    trace = traced()
    for call in trace:
        path = f'<a href="https://x.test">{call.index}</a>%{{z}}\x1b[8m'
        call.site = replace(call.site, path=path, layer=None, stack="<b>\u202e", kind="$x$")
    for figure in (render.plotly(trace[:1]), render.plotly(trace, view="model"), render.plotly(trace, view="distance")):
        shown = figure.to_dict()["layout"].get("annotations", ()), figure.layout.title.text
        said = json.dumps([shown, [(t.name, t.hovertemplate) for t in figure.data]], ensure_ascii=False)
        assert "&lt;b&gt;" in said and r"\\u202e" in said
        assert not re.search(r"<a|<b>|[\x00-\x1f\u202e$]", said)
        assert not any("%{z}" in (t.hovertemplate or "") for t in figure.data)


def test_cells_are_squares_and_what_is_grey_is_said() -> None:
    """Of any number of tokens: cells as wide as high, axes with a name, a short bar, labels apart."""
    for length in (3, 40, 300):
        trace = hookattn.trace(tiny.gpt2(n_positions=300), tiny.ids(length, 1), tokens=[["word"] * length])
        layout = render.plotly(trace, layer=0).layout
        wide = layout.width - layout.margin.l - layout.margin.r
        high = layout.height - layout.margin.t - layout.margin.b
        for axis in ("", "2", "3", "4"):
            x, y = layout[f"xaxis{axis}"].domain, layout[f"yaxis{axis}"].domain
            assert (x[1] - x[0]) * wide == pytest.approx((y[1] - y[0]) * high, rel=0.02)
        apart = (layout.xaxis3.domain[1] - layout.xaxis3.domain[0]) * wide / length
        assert np.diff(layout.xaxis3.tickvals).min() * apart >= 12
        assert layout.yaxis.title.text == "query" and layout.xaxis3.title.text == "key"
        assert layout.coloraxis.colorbar.len <= 150 and "masked" in [note.text for note in layout.annotations]


def test_colours_end_where_those_of_all_figures_do() -> None:
    trace = hookattn.trace(tiny.gpt2(n_positions=300), tiny.ids(100, 1))
    assert trace.faithful
    even = torch.ones(100, 100).tril()
    trace[0].fields["weights"] = (even / even.sum(-1, keepdim=True)).expand(1, 4, 100, 100)
    axis = render.plotly(trace, layer=0).layout.coloraxis
    pytest.importorskip("matplotlib")
    mesh = render.heatmap(trace, layer=0).findobj(lambda artist: artist.get_gid() == "head-0")[0]
    assert axis.cmax == mesh.norm.vmax < 1 and axis.colorbar.ticktext[-1] == f"≥ {axis.cmax:.3g}"


def test_numbers_beside_the_bar_are_round_and_leave_room_for_its_end() -> None:
    trace = hookattn.trace(tiny.gpt2(), tiny.ids(9, 1))
    trace.calls = trace.calls[:1]
    for largest in (0.037, 0.2, 0.31, 0.5, 0.93, 1.0):
        weights = torch.zeros(1, 4, 9, 9)
        weights[..., 0] = largest
        trace[0].fields["weights"] = weights
        bar = render.plotly(trace).layout.coloraxis.colorbar
        *inner, end = bar.tickvals
        assert 3 <= len(inner) <= 5 and inner[0] == 0 and end == pytest.approx(largest)
        assert all(len(text.lstrip("0.")) <= 2 for text in bar.ticktext[:-1]), bar.ticktext
        assert np.diff(bar.tickvals).min() > 0.09 * largest


def test_each_head_of_a_model_has_its_own_end() -> None:
    """A diffuse head is not blank beside a sharp one; numbers under the pointer stay what they are."""
    pytest.importorskip("matplotlib")
    trace = hookattn.trace(tiny.gpt2(), tiny.ids(9, 1))
    even, sharp = torch.full((9, 9), 1 / 9), torch.eye(9)
    trace[0].fields["weights"] = torch.stack([even, sharp, even, sharp])[None]
    trace.calls = trace.calls[:1]
    figure = render.plotly(trace, view="model", field="weights")
    drawn = [np.nanmax(np.array(t.z, float)) for t in figure.data[:2]]
    exact = [np.nanmax(np.array(t.customdata, float)) for t in figure.data[:2]]
    assert drawn == pytest.approx([1, 1]) and exact == pytest.approx([1 / 9, 1])
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0, 1) and tuple(axis.colorbar.ticktext) == ("0", "own end")
    scores = render.plotly(trace, view="model", field="scores")
    assert tuple(scores.layout.coloraxis.colorbar.ticktext) == ("−own end", "0", "own end")
    assert max(np.nanmax(np.abs(np.array(t.z, float))) for t in scores.data) == pytest.approx(1)
