"""A trace file that somebody else made, with scripts wherever it has text: nothing of it runs in a browser."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from hookattn.render.html_page import save_page
from hookattn.render.options import viewer_options
from tests.render.test_html_page import hostile
from tests.serving import Serving

pytestmark = pytest.mark.browser

RUN = "window.ran = (window.ran || 0) + 1"
WORD = (
    f"</script><script>{RUN}</script><img src=x onerror='{RUN}'><svg onload='{RUN}'><a href='javascript:{RUN}'>x</a>"
    f'<iframe srcdoc=\'<script>parent.{RUN}</script>\'></iframe>" autofocus onfocus="{RUN}" {{{{constructor}}}} \u2028'
)
VIEWS = ("overview", "head", "matrix", "model", "neuron", "lens", "flow", "compare", "certificates")
LIVE = "img[onerror], iframe, script, a[href^=javascript], [onload], [onfocus]"


def nothing_ran(tab: Any) -> None:
    for view in VIEWS:
        tab.evaluate("view => location.hash = JSON.stringify({ view, heads: [0], query: 2 })", view)
        tab.wait_for_timeout(300)
        # What is folded is opened, and whatever has words for a pointer or a focus gets them.
        tab.evaluate("document.querySelectorAll('details').forEach(d => (d.open = true))")
        tab.evaluate(
            """document.querySelectorAll("#viewer *").forEach(e => {
              for (const kind of ["pointermove", "mouseover", "focus"]) e.dispatchEvent(new Event(kind));
            })"""
        )
        assert tab.evaluate("window.ran") is None, view
        assert tab.locator("#viewer").locator(LIVE).count() == 0, view


def test_a_page(open_page: Callable[..., Any], tmp_path: Path) -> None:
    scores = {"a": {"values": [[1.0] * 3] * 2, "description": WORD, "unit": WORD}, "roles": [[[WORD]] * 3] * 2}
    path = save_page(hostile(WORD), tmp_path / "a.html", compare=hostile(WORD), scores=scores, title=WORD)
    tab = open_page()
    dialogs: list[str] = []
    tab.on("dialog", lambda dialog: dialogs.append(dialog.message))
    tab.goto(Path(path).as_uri())
    tab.wait_for_selector(".figure")
    assert tab.title().startswith("</script><script>")
    nothing_ran(tab)
    assert dialogs == []


def test_what_is_served(open_page: Callable[..., Any], tmp_path: Path) -> None:
    path = Path(hostile(WORD + "\x1b[8m\u202e").save(tmp_path / "a.safetensors"))
    options = viewer_options(scores={"a": {"values": [[1.0] * 3] * 2, "description": WORD, "unit": WORD}})
    with Serving(path, compare=str(path), options=options) as serving:
        tab = open_page()
        tab.route(serving.url + "**", lambda route: route.continue_())
        tab.goto(serving.url)
        tab.wait_for_selector(".figure")
        nothing_ran(tab)
        shown = tab.locator("body").inner_text()
        assert "\x1b" not in shown and "\u202e" not in shown
        tab.evaluate("location.hash = JSON.stringify({ view: 'model' })")
        tab.wait_for_timeout(500)
        with tab.expect_download() as saved:
            tab.get_by_role("button", name="SVG", exact=True).click()
        assert saved.value.suggested_filename == "a-model.svg"
        ET.parse(saved.value.path())
