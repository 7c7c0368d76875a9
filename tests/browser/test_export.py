"""Pictures that leave the page, and the page on paper: what they show stands on them."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import show

pytestmark = pytest.mark.browser
Open = Callable[..., Any]

VIEWS = {
    "matrix": ({"layer": 1, "heads": [2], "field": "scores", "query": 3, "key": 2}, "L1H2-batch0-scores-q3-k2"),
    "head": ({"layer": 1, "heads": [3, 0, 1]}, "L1H0-1.3-batch0"),
    "lens": ({"layer": 0, "heads": [1], "query": 3}, "L0H1-batch0-q3"),
    "model": ({}, "batch0"),
    "certificates": ({}, "batch0"),
}
TITLE = """text => [...new DOMParser().parseFromString(text, "image/svg+xml").documentElement.children]
  .filter((e) => e.tagName === "text" && e.getAttribute("y") <= 0).map((e) => e.textContent).join(" · ")"""


@pytest.mark.parametrize("view", VIEWS)
def test_a_picture_says_what_it_shows(open_page: Open, file: Path, view: str) -> None:
    chosen, named = VIEWS[view]
    page = show(open_page(), file)
    page.evaluate("s => viewer.set(s)", {"view": view, **chosen})
    page.wait_for_timeout(300)
    for ending in ("SVG", "PNG"):
        with page.expect_download() as saved:
            page.get_by_role("button", name=ending, exact=True).click()
        assert saved.value.suggested_filename == f"trace-{view}-{named}.{ending.lower()}"
    title = page.evaluate(TITLE, page.evaluate("viewer.svg()"))
    assert title.startswith("trace.safetensors · Layers · ")
    if view == "matrix":
        for part in (
            "layer 1",
            "head 2",
            "scores",
            "query 3 “",
            "key 2 “cat”",
            "✓ faithful",
            "≤",
            "batch entry 0",
        ):
            assert part in title, (part, title)
    if view == "lens":
        assert "scores" not in title and "weights" not in title  # it shows both
    if view == "head":
        assert "heads 0-1, 3" in title
    if view == "model":
        assert "head" not in title and "✓ 2 of 2 calls faithful" in title


def test_the_title_is_in_the_picture_whatever_its_width(open_page: Open, file: Path) -> None:
    page = show(open_page(viewport={"width": 400, "height": 800}), file, "{state: {view: 'matrix', query: 8, key: 8}}")
    page.locator(".plane canvas").wait_for()
    svg = page.evaluate("viewer.svg()")
    inside = page.evaluate(
        """text => { const box = document.body.appendChild(document.createElement("div")); box.innerHTML = text;
        const svg = box.firstChild, all = svg.getBoundingClientRect();
        return [...svg.querySelectorAll(":scope > text")].every((t) => { const r = t.getBoundingClientRect();
          return r.left >= all.left && r.right <= all.right && r.top >= all.top; }); }""",
        svg,
    )
    assert inside


def test_the_sentences_of_the_overview_are_in_its_picture(open_page: Open, file: Path) -> None:
    page = show(open_page(), file, "{state: {layer: 1, heads: [2], query: 5}}", view="overview")
    page.locator(".overview .bars button").first.wait_for()
    page.wait_for_function("viewer.findings.total > 0 && viewer.findings.done === viewer.findings.total")
    page.wait_for_timeout(300)
    said = page.locator(".overview .sentence").evaluate_all("all => all.map(e => e.textContent)")
    texts = page.evaluate(
        """text => [...new DOMParser().parseFromString(text, "image/svg+xml").querySelectorAll("text")]
        .map((t) => t.textContent).join(" ")""",
        page.evaluate("viewer.svg()"),
    )
    assert len(said) == 3
    for sentence in said:
        assert " ".join(sentence.split()) in " ".join(texts.split())


SEEN = """() => { const root = document.querySelector("#viewer").shadowRoot, seen = (s) =>
  [...root.querySelectorAll(s)].some((e) => e.checkVisibility());
  const ha = getComputedStyle(root.querySelector(".ha"));
  return { tabs: seen(".tabs"), controls: seen(".controls"), foot: seen(".ha > .foot"),
    title: seen(".caption") && root.querySelector(".caption").textContent,
    paper: ha.backgroundColor, ink: ha.color }; }"""
DARKEST = """() => { const c = document.querySelector("#viewer").shadowRoot.querySelector(".plane canvas");
  const d = c.getContext("2d").getImageData(c.width - 3, 2, 1, 1).data; return d[0] + d[1] + d[2]; }"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_page_is_printed_light_with_its_title_and_no_controls(open_page: Open, file: Path, theme: str) -> None:
    options = f"{{link: true, theme: '{theme}', state: {{view: 'matrix', layer: 1, heads: [2]}}}}"
    page = show(open_page(), file, options)
    page.locator(".plane canvas").wait_for()
    page.wait_for_timeout(200)
    on_screen = page.evaluate(SEEN)
    assert on_screen["tabs"] and on_screen["controls"] and on_screen["foot"] and not on_screen["title"]
    page.emulate_media(media="print")
    page.wait_for_timeout(200)
    printed = page.evaluate(SEEN)
    assert not printed["tabs"] and not printed["controls"] and not printed["foot"]
    assert "layer 1" in printed["title"] and "head 2" in printed["title"] and "faithful" in printed["title"]
    assert (printed["paper"], printed["ink"]) == ("rgb(255, 255, 255)", "rgb(27, 36, 48)")
    assert page.evaluate(DARKEST) > 400  # what is masked is light, too
    page.emulate_media(media="screen")
    page.wait_for_timeout(200)
    assert page.evaluate(SEEN)["paper"] == on_screen["paper"]


def test_a_picture_of_an_edited_call_says_so(open_page: Open, tmp_path: Path) -> None:
    from tests.browser.everything import pair_of_traces

    _, changed = pair_of_traces()
    page = show(open_page(), Path(changed.save(tmp_path / "t.safetensors")), "{state: {view: 'matrix', layer: 1}}")
    page.locator(".plane canvas").wait_for()
    assert "edited: zero(weights)" in page.evaluate(TITLE, page.evaluate("viewer.svg()"))
    page.evaluate("viewer.set({layer: 0})")
    page.wait_for_timeout(200)
    assert "edited" not in page.evaluate(TITLE, page.evaluate("viewer.svg()"))


def test_what_comes_out_of_the_printer_is_the_same_in_both_themes(open_page: Open, file: Path) -> None:
    colours = []
    for theme in ("light", "dark"):
        options = f"{{link: true, theme: '{theme}', state: {{view: 'lens', layer: 1}}}}"
        page = show(open_page(), file, options)
        page.locator(".facts").wait_for()
        parts = re.findall(rb"stream\r?\n(.*?)endstream", page.pdf(), re.DOTALL)
        drawn = b"".join(zlib.decompressobj().decompress(part) for part in parts if part[:1] == b"x")
        colours.append(sorted(set(re.findall(rb"([\d.]+ [\d.]+ [\d.]+) rg", drawn))))
    assert colours[0] == colours[1] and len(colours[0]) >= 3
