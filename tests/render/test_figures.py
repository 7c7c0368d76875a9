"""Figures: what their artists say, against the call and arithmetic of their own; and the files they become."""

from __future__ import annotations

import ast
import itertools
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text

import hookattn
from hookattn import render
from hookattn.calls.certificate import Certificate
from hookattn.errors import FieldNotCaptured, SelectionError, TraceWriteError
from hookattn.render.figures import VIEWS
from hookattn.render.figures.files import save
from hookattn.render.figures.ticks import SMALLEST
from hookattn.render.palette import HEADS, LINE, SEQUENTIAL_STOPS
from tests import tiny_models as tiny

WORDS = ["Ġthe", "Ġcat", "s", "Ġ$x$", "</script>", "Ċ", "Ġcaf", "Ã©"]
LABELS = ["the", "cat", "…s", "␣$x$", "</script>", "↵", "␣caf", "…é"]


def traced(model: str = "gpt2", length: int = 8, **options: Any) -> hookattn.Trace:
    tokens = (WORDS * 20)[:length]
    inputs: Any = {"input_ids": tiny.ids(length)}
    if model == "t5":
        inputs["decoder_input_ids"] = tiny.ids(5)
    return hookattn.trace(getattr(tiny, model)(), inputs, tokens=[tokens, tokens], **options)


def measured(trace: hookattn.Trace) -> hookattn.Trace:
    """The trace, whose fields may be exchanged now: its certificates are of those that it has had."""
    assert trace.faithful
    return trace


def named(figure: Figure, gid: str) -> Any:
    found = figure.findobj(lambda artist: artist.get_gid() == gid)
    assert len(found) == 1, f"{len(found)} artists are named {gid!r}"
    return found[0]


def names(figure: Figure, start: str) -> list[str]:
    return sorted(a.get_gid() for a in figure.findobj(lambda artist: (artist.get_gid() or "").startswith(start)))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def ends_of(lines: Any) -> list[tuple[float, float]]:
    """Where the lines of a head begin and end."""
    assert all(tuple(path.vertices[:, 0]) == (0, LINE["bend"], 1 - LINE["bend"], 1) for path in lines.get_paths())
    return [(path.vertices[0][1], path.vertices[-1][1]) for path in lines.get_paths()]


def draw(view: str, trace: hookattn.Trace) -> Figure:
    one_call = {"layer": 1} if view in ("matrix", "head") else {}
    one_row = {"layer": 1, "heads": 2, "queries": 4} if view in ("neuron", "lens") else {}
    return VIEWS[view].draw(trace, **one_call, **one_row)


# --------------------------------------------------------------------------------------------------- the views


def test_heatmap_has_the_weights() -> None:
    trace = traced()
    call = trace[1]
    figure = render.heatmap(trace, layer=1, heads=[3, 0], batch=1)
    assert names(figure, "head-") == ["head-0", "head-3"]
    hidden = ~call.mask.expand_as(call.weights)[1, 0].numpy()
    for head in (0, 3):
        shown = named(figure, f"head-{head}").get_array()
        assert np.array_equal(shown.mask, hidden)
        assert np.array_equal(shown.data, call.weights[1, head].double().numpy())
    panels = [axes for axes in figure.axes if axes.get_title() in ("head 3", "head 0")]
    assert [t.get_text() for t in panels[0].get_yticklabels()] == LABELS
    assert [t.get_text() for t in panels[1].get_xticklabels()] == LABELS
    assert panels[0].yaxis_inverted() and panels[0].patch.get_hatch()
    assert {"decoder layer 1", "masked", "weight", "query", "key"} <= set(texts(figure))


def test_heatmap_of_scores_and_of_the_mask() -> None:
    trace = traced()
    call = trace[0]
    mesh = named(render.heatmap(trace, layer=0, heads=1, field="scores"), "head-1")
    assert np.array_equal(mesh.get_array().data, call.scores[0, 1].double().numpy())
    seen = call.scores[0, 1][call.mask.expand_as(call.scores)[0, 1]].abs().max().item()
    assert mesh.norm.vmax == pytest.approx(seen) and mesh.norm.vmin == pytest.approx(-seen)
    figure = render.heatmap(trace, layer=0, heads=1, field="mask")
    assert np.array_equal(~named(figure, "head-1").get_array().mask, call.mask.expand_as(call.scores)[0, 1].numpy())
    assert "may attend" in texts(figure)


def test_heatmap_without_a_mask_says_so() -> None:
    figure = render.heatmap(traced(capture="weights"), layer=0, heads=0)
    assert "mask not captured: a 0 may be a masked entry" in texts(figure)
    assert not named(figure, "head-0").get_array().mask.any() and "masked" not in texts(figure)


def test_heatmap_logarithmic_and_without_the_sink() -> None:
    figure = render.heatmap(traced(), layer=1, heads=1, scale="log", sink="renormalise")
    mesh = named(figure, "head-1")
    assert mesh.norm.vmin == 1e-4 and mesh.norm(1e-4) == 0 and mesh.norm(1.0) == 1
    assert mesh.norm(1e-2) == pytest.approx(0.5)
    assert np.allclose(mesh.get_array().sum(-1)[1:], 1) and mesh.get_array().shape == (8, 7)
    assert "first key left out, rows divided by the rest" in texts(figure)
    figure.canvas.draw()
    assert {"≤ 0.0001", "0.01", "1"} <= set(texts(figure))


def test_heatmap_of_very_many_tokens_is_pooled_and_says_so() -> None:
    trace = measured(traced(length=5))
    call = trace[0]
    weights = torch.zeros(1, 4, 2100, 2100)
    weights[0, 0, 1203, 7] = 1.0
    call.fields = {"weights": weights}
    call.derivable = ()
    figure = render.heatmap(trace, layer=0, heads=0)
    shown = named(figure, "head-0").get_array()
    assert shown.shape == (700, 700) and shown[401, 2] == 1 and shown.sum() == 1
    assert "each pixel is the largest of 3 × 3 entries" in texts(figure)


def test_heads_has_a_line_for_each_weight() -> None:
    trace = traced()
    call = trace[1]
    figure = render.heads(trace, layer=1, heads=[0, 2], least=0.05)
    colours = set()
    for head in (0, 2):
        lines = named(figure, f"head-{head}")
        expected = [(i, j) for i in range(8) for j in range(8) if call.weights[0, head, i, j] >= 0.05]
        assert ends_of(lines) == expected and expected
        alphas = [call.weights[0, head, i, j].item() for i, j in expected]
        assert np.allclose(lines.get_edgecolors()[:, 3], alphas)
        colours.add(tuple(lines.get_edgecolors()[0, :3]))
        assert matplotlib.colors.to_hex(lines.get_edgecolors()[0, :3]) == HEADS[head]  # whichever others are drawn
    assert len(colours) == 2
    shown = texts(figure)
    assert all(shown.count(label) == 2 for label in LABELS) and {"head 0", "head 2"} <= set(shown)


def test_heads_of_a_cross_attention() -> None:
    trace = traced("t5")
    call = trace.select(kind="cross", layer=0)[0]
    figure = render.heads(trace, kind="cross", layer=0, heads=1, least=0.2, tokens=list("vwxyz"))
    lines = ends_of(named(figure, "head-1"))
    assert len(lines) == int((call.weights[0, 1] >= 0.2).sum()) > 0
    assert set("vwxyz") <= set(texts(figure)) and texts(figure).count("cat") == 1
    with pytest.raises(SelectionError, match="least=0"):
        render.heads(trace, kind="cross", layer=0, least=0)


def test_layers_has_a_thumbnail_for_each_head() -> None:
    trace = traced(length=100)
    figure = render.layers(trace)
    assert len(names(figure, "layer-")) == 8
    image = named(figure, "layer-1-head-3")
    weights = trace[1].weights[0, 3]
    assert image.get_array().shape == (50, 50)
    assert np.allclose(np.ma.filled(image.get_array(), 0), weights.view(50, 2, 50, 2).amax((1, 3)).double())
    assert "each pixel is the largest of up to 2 × 2 entries" in texts(figure)
    with pytest.raises(SelectionError, match=r"one stack, and there are 'encoder', 'decoder'; give stack="):
        render.layers(traced("t5"))


def test_ragged_layers() -> None:
    trace = traced()
    trace.calls[0] = traced(heads=[1, 3])[0]
    figure = render.layers(trace)
    assert names(figure, "layer-") == [f"layer-0-head-{h}" for h in (1, 3)] + [f"layer-1-head-{h}" for h in range(4)]


def test_distance_has_a_line_for_each_head() -> None:
    trace = traced()
    figure = render.distance(trace, batch=1)
    line = named(figure, "layer-0-head-2")
    weights = trace[0].weights[1, 2].double()
    assert np.allclose(line.get_ydata(), [weights.diagonal(-d).mean().item() for d in range(8)])
    assert line.get_xdata().tolist() == list(range(8))
    assert len(names(figure, "layer-")) == 8
    with pytest.raises(SelectionError, match="scale='cubic'"):
        render.distance(trace, scale="cubic")  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "stack"), [("gpt2", None), ("llama", None), ("gemma2", None), ("t5", "encoder")])
def test_neuron_adds_up(model: str, stack: str | None) -> None:
    trace = traced(model)
    call = trace.select(layer=1, stack=stack, kind="self")[0]
    figure = render.neuron(trace, layer=1, stack=stack, heads=3, queries=5)
    q, k = call.q[0, 3, 5].double(), call.k[0, 3 * call.k.shape[1] // 4].double()
    assert np.allclose(named(figure, "q").get_array(), q[None])
    assert np.allclose(named(figure, "k").get_array(), k)
    assert np.allclose(named(figure, "q∘k").get_array(), q * k)
    for j in range(8):
        if not call.mask.expand_as(call.weights)[0, 3, 5, j]:
            assert not names(figure, f"weight-{j}")
            continue
        assert named(figure, f"scaled-{j}").get_width() == pytest.approx((k[j] @ q).item() * call.scale, rel=1e-5)
        assert named(figure, f"weight-{j}").get_width() == pytest.approx(call.weights[0, 3, 5, j].item(), abs=1e-6)
        if model in ("gemma2", "t5"):
            assert named(figure, f"score-{j}").get_width() == pytest.approx(call.scores[0, 3, 5, j].item(), rel=1e-5)
    assert ("score" in texts(figure)) == (model in ("gemma2", "t5"))


def test_small_numbers_are_told_apart() -> None:
    """Two digits that count for the largest, and no zero with a sign."""
    trace = measured(traced(length=5))
    call = trace[0]
    scores = torch.tensor([-0.004, 0.0, 1.0, 2.0, 3.0]).view(1, 1, 1, 5).expand(1, 4, 5, 5)
    weights = torch.tensor([0.0193, 0.0187, 0.01, 0.0, 0.0]).view(1, 1, 1, 5).expand(1, 4, 5, 5)
    call.fields = {**call.fields, "scores": scores, "weights": weights, "mask": torch.ones(1, 1, 1, 1).bool()}
    written = texts(render.lens(trace, layer=0, heads=0))
    assert [w for w in written if w.startswith("0.0")] == ["0.019", "0.019", "0.010", "0.000", "0.000"]
    call.fields |= {"weights": weights * 10, "q": torch.zeros_like(call.q)}
    written = texts(render.neuron(trace, layer=0, heads=0))
    assert written.count("0.19") == 2 and not any(w.startswith("-0.0") for w in written)


def test_lens_gives_the_reason() -> None:
    """Four keys and a masked one, with weights made for each of the words."""
    trace = measured(traced(length=5))
    call = trace[0]
    scores = torch.log(torch.tensor([0.70, 0.24, 0.05, 0.01, 0.9])).view(1, 1, 1, 5).repeat(1, 4, 5, 1)
    mask = torch.tensor([True, True, True, True, False]).view(1, 1, 1, 5)
    weights = torch.softmax(torch.where(mask, scores, -torch.inf), -1)
    call.fields = {"scores": scores, "mask": mask, "weights": weights, "sinks": None}
    figure = render.lens(trace, layer=0, heads=0, queries=4)
    words = [t for t in texts(figure) if t in ("attended", "outscored", "drained", "masked")]
    assert words == ["attended", "drained", "outscored", "outscored", "masked"]  # 0.24 of 0.30 is more than 1/4
    assert "70% goes to the first key" in texts(figure)
    assert named(figure, "log-of-the-denominator").get_xdata()[0] == pytest.approx(0.0, abs=1e-6)
    assert [named(figure, f"weight-{j}").get_width() for j in range(4)] == pytest.approx([0.70, 0.24, 0.05, 0.01])
    call.fields |= {"sinks": torch.full((4,), math.log(9.0)), "weights": weights / 10}
    figure = render.lens(trace, layer=0, heads=0, queries=4)
    assert "90% goes to the learned sink" in texts(figure)
    assert named(figure, "log-of-the-denominator").get_xdata()[0] == pytest.approx(math.log(10.0), abs=1e-6)


@pytest.mark.parametrize("n", [3, 7, 11, 41, 49])
def test_equal_weights_are_attended_to(n: int) -> None:
    """1/n in float32 may be less than 1/n."""
    trace = measured(traced(length=5))
    scores, weights = torch.zeros(1, 4, 5, n), torch.full((1, 4, 5, n), 1 / n)
    trace[0].fields = {"scores": scores, "mask": torch.ones(1, 1, 1, 1).bool(), "weights": weights, "sinks": None}
    assert texts(render.lens(trace, layer=0, heads=0)).count("attended") == n


def test_lens_of_a_row_with_nothing_to_attend_to() -> None:
    trace = measured(traced(length=5))
    trace[0].fields["mask"] = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    assert "nothing to attend to" in texts(render.lens(trace, layer=0, heads=0))


def test_one_query_of_one_head() -> None:
    trace = traced(length=150)
    for view in (render.neuron, render.lens):
        with pytest.raises(SelectionError, match="draws one head; give heads= of 0, 1, 2, 3"):
            view(trace, layer=0)
        with pytest.raises(SelectionError, match="draws one query, and 2 are selected"):
            view(trace, layer=0, heads=0, queries=[1, 2])
        figure = view(trace, layer=0, heads=0)
        assert "the 100 keys of 150 that weigh most" in texts(figure)
        shown = {int(name.partition("-")[2]) for name in names(figure, "weight-")}
        assert shown == set(trace[0].weights[0, 0, -1].topk(100).indices.tolist())


# ------------------------------------------------------------------------------------------- what holds for all


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("length", [5, 20, 100])
def test_labels_can_be_read(view: str, length: int) -> None:
    """No text is smaller than six points, and labels of one axis don't overlap."""
    figure = draw(view, traced(length=length))
    figure.canvas.draw()
    for text in figure.findobj(Text):
        assert not text.get_text() or not text.get_visible() or text.get_fontsize() >= SMALLEST
    for axes in figure.axes:
        boxes = [t.get_window_extent() for t in axes.get_yticklabels() if t.get_text() and t.get_visible()]
        centres = sorted((box.y0 + box.y1) / 2 for box in boxes)
        if len(centres) > 1:
            gap = min(b - a for a, b in itertools.pairwise(centres))
            assert gap / figure.dpi * 72 >= 0.95 * SMALLEST
    width, height = figure.get_size_inches()
    assert width <= 12 and height <= 12


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", ["svg", "pdf", "png"])
def test_the_same_bytes_each_time(view: str, kind: str, tmp_path: Path) -> None:
    """Also where settings differ, which stay as they were, and without a pyplot figure."""
    trace = traced()
    save(draw(view, trace), tmp_path / f"a.{kind}", kind)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        draw(view, trace).savefig(tmp_path / f"b.{kind}")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


@pytest.mark.parametrize("view", VIEWS)
def test_svg_text_is_text(view: str, tmp_path: Path) -> None:
    draw(view, traced()).savefig(tmp_path / "x.svg")
    root = ET.parse(tmp_path / "x.svg").getroot()
    assert not [e for e in root.iter() if e.tag.endswith("script")]
    said = ["".join(e.itertext()).strip() for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert (view in ("model", "distance")) or {"cat", "␣$x$", "</script>", "…é"} <= set(said)
    assert any(re.fullmatch(r"head.*|.*head 2.*", t) for t in said)


def test_vectors_are_vectors(tmp_path: Path) -> None:
    """A cell is a path, and its colour the weight's; no picture is embedded."""
    trace = traced(length=5)
    render.heatmap(trace, layer=0, heads=0).savefig(tmp_path / "x.svg")
    root = ET.parse(tmp_path / "x.svg").getroot()
    cells = [e for g in root.iter("{http://www.w3.org/2000/svg}g") if g.get("id") == "head-0" for e in g]
    cells = [cell for cell in cells if "fill: none" not in str(cell.get("style"))]
    assert len(cells) == int(trace[0].mask.expand_as(trace[0].weights)[0, 0].sum())
    first = re.search(r"fill: (#\w{6})", str(cells[0].get("style")))
    assert first and first[1] == SEQUENTIAL_STOPS[-1]


def test_pdf_has_fonts_that_can_be_searched(tmp_path: Path) -> None:
    draw("head", traced()).savefig(tmp_path / "x.pdf")
    data = (tmp_path / "x.pdf").read_bytes()
    inside = b"".join(_inflated(m) for m in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", data, re.DOTALL))
    assert b"/Type3" not in data and b"/FontFile2" in data and b"beginbfrange" in inside
    assert b"CreationDate" not in data


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompress(data)
    except zlib.error:
        return b""


def test_a_notebook_shows_it() -> None:
    assert draw("head", traced())._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("view", VIEWS)
def test_what_is_not_faithful_says_so(view: str) -> None:
    trace = traced()
    bad = Certificate("unfaithful", 0.5, None, 0.0, 1e-5, 1e-5, 8, 8, "output")
    for call in trace:
        call.certificate = bad
    assert any(text.endswith("unfaithful: off by 5.0e-01, allowed 1.0e-05") for text in texts(draw(view, trace)))
    assert not any("unfaithful" in text for text in texts(draw(view, traced())))


def test_doubts_of_many_layers_are_few_lines() -> None:
    trace = traced(length=5, verify="off")
    assert "decoder layer 0 and 1 more: not verified" in texts(render.layers(trace))
    for i, call in enumerate([*trace, *traced(length=5), *traced(length=5)]):
        call.certificate = Certificate("unfaithful", 0.1 + i, None, 0.0, 1e-5, 1e-5, 8, 8, "output")
        call.index, call.site = i, hookattn.Site("x", i, "decoder")
        trace.calls[i : i + 1] = [call]
    told = texts(render.distance(trace))
    assert sum("unfaithful" in text for text in told) == 4 and "and 2 more like these" in told


def test_positions_have_round_steps() -> None:
    trace = hookattn.trace(tiny.gpt2(n_positions=300), tiny.ids(300, 1))
    figure = render.heatmap(trace, layer=0, heads=0)
    assert {"0", "5", "295"} <= set(texts(figure)) and "4" not in texts(figure)


@pytest.mark.parametrize("view", VIEWS)
def test_a_missing_field_names_the_capture(view: str) -> None:
    with pytest.raises(FieldNotCaptured, match="trace again with capture="):
        draw(view, traced(capture=("q", "mask")))


@pytest.mark.parametrize(("options", "message"), [
    ({"field": "q"}, "field='q': expected one of weights, applied, scores, mask"),
    ({"scale": "sqrt"}, "scale='sqrt'"),
    ({"sink": "hide"}, "sink='hide'"),
    ({"field": "scores", "scale": "log"}, "has no logarithm"),
    ({"field": "mask", "sink": "renormalise"}, "is for weights"),
])  # fmt: skip
@pytest.mark.parametrize("view", [render.heatmap, render.layers])
def test_what_does_not_go_together(view: Callable[..., Figure], options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        view(traced(), **options)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(TraceWriteError, match="Create the directory first"):
        save(draw("head", traced()), tmp_path / "none" / "x.svg", "svg")


def test_no_window_and_no_pyplot() -> None:
    code = """
import sys, hookattn.render as render
assert "matplotlib" not in sys.modules and "plotly" not in sys.modules and "numpy" not in vars(render)
render.heatmap
assert "matplotlib.pyplot" not in sys.modules
import contextlib, importlib, pkgutil, types
for module in pkgutil.walk_packages(render.__path__, "hookattn.render."):
    with contextlib.suppress(ImportError):  # of an extra that is not installed
        importlib.import_module(module.name)  # binds its name in its package
    if module.name.count(".") == 2:
        assert module.name.split(".")[2] not in render.__all__, f"{module.name} is named as what is public is"
for name in render.__all__:
    with contextlib.suppress(ImportError):
        assert callable(getattr(render, name)) and not isinstance(getattr(render, name), types.ModuleType), name
try: render.nothing
except AttributeError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no attribute 'nothing'; there are " in done.stdout


def test_without_matplotlib_the_extra_is_named() -> None:
    code = """
import sys
sys.modules["matplotlib"] = None
import hookattn.render
try: hookattn.render.heads
except ModuleNotFoundError as error: print(error.__notes__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'hookattn: pip install "hookattn[render]"' in done.stdout, done.stderr


def test_type_checkers_see_what_the_package_has() -> None:
    """The names stand in two lists, as type checkers read no other: what is missing from one of them is said here."""
    tree = ast.parse(Path(render.__file__).read_text(encoding="utf-8"))
    typed = {
        (alias.asname, f"{render.__name__}.{line.module}")
        for block in tree.body
        if isinstance(block, ast.If)
        for line in block.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    assert typed == {(name, getattr(render, name).__module__) for name in render.__all__}
    assert {view.function for view in VIEWS.values()} < set(render.__all__)


@pytest.mark.parametrize("view", sorted(VIEWS))
def test_a_figure_of_a_hostile_trace_is_whole_xml(view: str, tmp_path: Path) -> None:
    """XML has no form for control characters, so that a path with one in it would make a file that nothing opens."""
    trace = measured(traced())
    for call in trace:
        call.site = replace(call.site, path="\x1b]0;t\x07\ud800", layer=None, stack="\x00\u202e", kind="\x9b$x$<g>")
    where = {"heads": [0], "queries": [-1]} if view in ("lens", "neuron") else {}
    options = {} if view in ("model", "layers", "distance") else where
    part = trace if view in ("model", "layers", "distance") else trace[:1]
    save(VIEWS[view].draw(part, **options), str(tmp_path / "a.svg"), "svg", 100)
    text = (tmp_path / "a.svg").read_text("utf-8")
    ET.fromstring(text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert r"\x00\u202e" in text


def test_a_bar_of_own_ends_says_that_some_clip() -> None:
    trace = hookattn.trace(tiny.gpt2(n_positions=300), tiny.ids(100, 1))
    even = torch.ones(100, 100).tril()
    trace[0].fields["weights"] = (even / even.sum(-1, keepdim=True)).expand(1, 4, 100, 100)
    assert "≥ own end" in texts(render.layers(trace))
    assert "own end" in texts(render.layers(hookattn.trace(tiny.gpt2(), tiny.ids(5, 1)), field="scores"))
