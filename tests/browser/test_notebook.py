"""A notebook that was run, saved and exported: no kernel, no network, and the view is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("anywidget")
pytest.importorskip("nbconvert")

import nbformat
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExecutePreprocessor

from hookattn.render.widget import _FALLBACK

pytestmark = pytest.mark.browser

CELL = """
import torch, hookattn
from hookattn.demo.induction import example_tokens, load_pretrained
ids = example_tokens(0, length=8)
trace = hookattn.trace(load_pretrained(), ids, tokens=[[f"t{i}" for i in ids[0].tolist()]])
hookattn.render.show(trace, state={"layer": 1})
"""


@pytest.fixture(scope="module", params=[True, False], ids=["with widget state", "without"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An executed notebook as HTML, with the state of its widgets saved in it or not."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import hookattn.render" + CELL)])
    ExecutePreprocessor(timeout=120, store_widget_state=request.param).preprocess(notebook)
    assert ("widgets" in notebook.metadata) == request.param
    path = tmp_path_factory.mktemp("notebook") / "a.html"
    path.write_text(HTMLExporter(mathjax_url="", require_js_url="").from_notebook_node(notebook)[0], "utf-8")
    return path


def test_an_exported_notebook_shows_the_view(open_page: Callable[..., Any], exported: Path) -> None:
    tab = open_page()
    tab.goto(exported.as_uri())
    frame = tab.frame_locator("iframe[title=hookattn]")
    frame.locator(".figure").wait_for(timeout=30_000)
    frame.locator(".ha", has_text="layer 1").filter(has_text="t0").wait_for(timeout=10_000)
    # What the exporter itself asks for, to run widgets with, is not there; nothing else is missed.
    assert tab.get_by_text("The widget is not running here").is_visible()
    assert not tab.locator("[data-still]").is_visible()
    tab.problems[:] = [p for p in tab.problems if "cdn" not in p and "unpkg" not in p and "ERR_FAILED" not in p]


def test_where_no_script_runs_the_still_picture_is_seen(browser: Any, exported: Path) -> None:
    """As a code host shows a notebook, or a reader that trusts none."""
    context = browser.new_context(java_script_enabled=False, offline=True)
    tab = context.new_page()
    tab.goto(exported.as_uri())
    pictures = tab.locator("img[alt*='heads of']")
    assert pictures.count() == 2 and all(one.is_visible() for one in pictures.all())
    assert tab.get_by_text("Trace(2 calls of InductionTransformer)", exact=True).is_visible()
    assert not tab.get_by_text("The widget is not running here").is_visible()
    context.close()


def test_in_a_sandbox_the_view_is_shown(open_page: Callable[..., Any], exported: Path, tmp_path: Path) -> None:
    """Where a reader of notebooks puts outputs into a frame of no origin, no frame in it can be looked into."""
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<iframe sandbox="allow-scripts" src="{exported.as_uri()}" style="width: 1200px; height: 800px"></iframe>'
    )
    tab = open_page()
    tab.goto(outer.as_uri())
    inside = tab.frame_locator("iframe")
    inside.locator("[data-still]").wait_for(state="hidden", timeout=20_000)
    inside.frame_locator("iframe[title=hookattn]").locator(".figure").wait_for(timeout=30_000)
    tab.problems[:] = [p for p in tab.problems if "cdn" not in p and "unpkg" not in p and "ERR_FAILED" not in p]


def test_a_live_widget_is_not_doubled(open_page: Callable[..., Any], tmp_path: Path) -> None:
    live = """<div class="x1"><div id="el"></div></div><script>
    const shadow = document.getElementById("el").attachShadow({ mode: "open" });
    shadow.innerHTML = '<div class="figure">live</div>';</script>"""
    path = tmp_path / "a.html"
    path.write_text(live + _FALLBACK.format(id="x2", live="x1", still="<p>still</p>", page="AAAA"), "utf-8")
    tab = open_page()
    tab.goto(path.as_uri())
    tab.wait_for_timeout(4_000)
    assert tab.locator("iframe").count() == 0 and not tab.locator("#x2").is_visible()
