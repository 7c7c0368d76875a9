"""What is saved is exactly as wide as it was asked to be, with all that is drawn inside, and labels apart."""

from __future__ import annotations

import itertools
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
pytest.importorskip("pandas")

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

import hookattn
from hookattn import render
from hookattn.errors import InputError, RenderError, SelectionError
from hookattn.render.figures import VIEWS
from hookattn.render.figures.fitting import WIDTHS
from tests import tiny_models as tiny

WORDS = {
    "plain": ["the", "cat", "sat", "s"],
    "long": ["internationalisation", "mmmmmmmmmmmmmmmmmmmm", "WWWWWWWWWWWWWWWW", "i"],
    "right to left": ["שלום", "العربية", "مرحبا", "עולם"],
    "CJK": ["你好", "世界", "こんにちは世界こんにちは世界", "한국어"],
}
LENGTHS = (1, 10, 35, 100, 512)


def traced(length: int, words: list[str] | None = None) -> hookattn.Trace:
    tokens = None if words is None else [(words * length)[:length]]
    return hookattn.trace(tiny.gpt2(n_positions=520), tiny.ids(length, 1), tokens=tokens)


def draw(view: str, trace: hookattn.Trace, **options: Any) -> Figure:
    where: dict[str, Any] = {"layer": 1} if view in ("matrix", "head") else {}
    if view in ("neuron", "lens"):
        where = {"layer": 1, "heads": 2}
    return VIEWS[view].draw(trace, **where, **options)


def boxes_of(figure: Figure) -> list[tuple[Text, Bbox]]:
    """Where each text is, in inches from the lower left corner; a turned one has the box of its turned letters."""
    figure.canvas.draw()
    hidden = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
        if not label.get_visible()
        or not axis.get_view_interval().min() <= tick.get_loc() <= axis.get_view_interval().max()
    }
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible() and t not in hidden]
    return [(t, t.get_window_extent().transformed(figure.dpi_scale_trans.inverted())) for t in texts]


def check(figure: Figure, width: float) -> None:
    wide, high = figure.get_size_inches()
    assert wide == pytest.approx(width, abs=1e-9)
    boxes = boxes_of(figure)
    for text, box in boxes:
        assert text.get_fontsize() >= 6, text
        inside = box.x0 >= -1e-3 and box.x1 <= wide + 1e-3 and box.y0 >= -1e-3 and box.y1 <= high + 1e-3
        assert inside, f"{text} is cut: {box} of {wide} × {high}"
    for (a, first), (b, second) in itertools.combinations(boxes, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        along = min(first.y1, second.y1) - max(first.y0, second.y0)
        # Boxes have the room of the tallest letters, and letters of the line above reach none of those below.
        assert across < 0.015 or along < 0.025, f"{a} covers {b}: {first} {second}"


@pytest.mark.parametrize("width", ["column", "page"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("view", VIEWS)
def test_as_wide_as_asked_and_nothing_covers_anything(view: str, length: int, width: str) -> None:
    check(draw(view, traced(length, WORDS["plain"]), width=width), WIDTHS[width])


@pytest.mark.parametrize("words", [None, *list(WORDS)[1:]])
@pytest.mark.parametrize("length", [10, 35])
@pytest.mark.parametrize("view", VIEWS)
def test_labels_of_any_script(view: str, length: int, words: str | None) -> None:
    for width in ("column", "page"):
        check(draw(view, traced(length, words and WORDS[words]), width=width), WIDTHS[width])


@pytest.mark.parametrize("view", VIEWS)
def test_the_file_is_as_wide(view: str, tmp_path: Path) -> None:
    """3.3 in are 3.3 in in each kind of file; and without a width it is as large as it takes, with no edge cut."""
    trace = traced(35, WORDS["plain"])
    figure = draw(view, trace, width="column")
    figure.savefig(tmp_path / "x.svg")
    found = re.search(r'width="([\d.]+)pt"', (tmp_path / "x.svg").read_text("utf-8"))
    assert found and float(found[1]) / 72 == pytest.approx(3.3, abs=1e-3)
    figure.savefig(tmp_path / "x.pdf")
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", (tmp_path / "x.pdf").read_bytes())
    assert box and float(box[1]) / 72 == pytest.approx(3.3, abs=1e-3)
    free = draw(view, trace)
    check(free, float(free.get_size_inches()[0]))
    assert draw(view, trace, width=5.5).get_size_inches()[0] == 5.5


@pytest.mark.parametrize("width", ["column", "page"])
@pytest.mark.parametrize(("layers", "heads"), [(2, 4), (12, 12), (80, 64), (1, 128)])
def test_atlas(layers: int, heads: int, width: str) -> None:
    rows = [(n, h, "induction" if h % 3 else "") for n in range(layers) for h in range(heads)]
    table = pd.DataFrame(rows, columns=["layer", "head", "role"])
    table["evidence"] = ["induction 0.71 (uniform 0.02)" if role else "" for role in table["role"]]
    table["entropy"], table["previous_token"] = 1.0, 0.5
    check(render.atlas(table, width=width), WIDTHS[width])
    check(render.atlas(table, ["entropy", "previous_token"], width=width), WIDTHS[width])


@pytest.mark.parametrize("view", VIEWS)
def test_a_title_is_left_out_or_set(view: str) -> None:
    trace = traced(10)
    usual = {t.get_text() for t, _ in boxes_of(draw(view, trace))}
    without = {t.get_text() for t, _ in boxes_of(draw(view, trace, title=False))}
    mine = {t.get_text() for t, _ in boxes_of(draw(view, trace, title="Mine"))}
    assert len(usual - without) == 1 and "Mine" in mine and usual - mine == usual - without
    long = draw(
        view, trace, title="A title of many words that no column of a paper has the room for. " * 3, width="column"
    )
    check(long, 3.3)


def test_what_a_width_is() -> None:
    trace = traced(10)
    for wrong in ("wide", 0.2, -1, float("nan"), 1e9, [3]):
        with pytest.raises(SelectionError, match="width="):
            render.heatmap(trace, layer=0, width=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="title=3"):
        render.heatmap(trace, layer=0, title=3)  # type: ignore[arg-type]
    with pytest.raises(RenderError, match=r"can't be 1 in wide: it takes \d"):
        render.neuron(trace, layer=0, heads=0, width=1)


def test_the_colour_bar_says_where_it_clips() -> None:
    """A causal head is always sure of its first query: the colours of a diffuse one end where the other rows do."""
    trace = traced(100)
    assert trace.faithful
    call = trace[0]
    weights = torch.tril(torch.ones(100, 100))
    call.fields = {**call.fields, "weights": (weights / weights.sum(-1, keepdim=True)).expand(1, 4, 100, 100)}
    figure = render.heatmap(trace, layer=0, heads=0)
    (mesh,) = figure.findobj(lambda artist: artist.get_gid() == "head-0")
    assert 0.02 <= mesh.norm.vmax <= 0.1 and f"≥ {mesh.norm.vmax:.3g}" in {t.get_text() for t, _ in boxes_of(figure)}
    assert mesh.get_array().max() == 1  # the numbers are the call's own


def test_many_lines_are_the_strongest_and_say_how_much_they_are() -> None:
    trace = traced(100)
    weights = trace[0].weights[0].double()
    figure = render.heads(trace, layer=0, width="column")
    lines = figure.findobj(lambda artist: (artist.get_gid() or "").startswith("head-"))
    drawn = sum(len(one.get_paths()) for one in lines)
    assert 300 <= drawn <= 600
    least = weights.flatten().sort().values[-drawn]
    share = (weights[weights >= least].sum() / weights.sum()).item()
    assert f"lines from {least.item():.2g} on, {share:.0%} of the attention" in {
        t.get_text() for t, _ in boxes_of(figure)
    }


def test_the_gallery_has_every_figure_at_both_widths(tmp_path: Path) -> None:
    gallery = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "gallery.py"))
    written = [path.name for path in gallery["draw"](tmp_path, "svg")]
    drawn = {figure.__name__ for figure, _ in gallery["FIGURES"].values()}
    assert drawn == {"atlas", *(view.function for view in VIEWS.values())}
    assert {f"heatmap-{width}.svg" for width in WIDTHS} < {*written} and len(written) == 2 * len(gallery["FIGURES"]) + 1
