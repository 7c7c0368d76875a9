"""Traces that lack something, in every view, and browsers that do: what is missing is said, and nothing breaks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn import render
from tests.browser.conftest import Layers, causal, show, state
from tests.browser.test_axe import AXE, violations

pytestmark = pytest.mark.browser
Open = Callable[..., Any]


def made(n: int = 6, layers: int = 2, **options: Any) -> hookattn.Trace:
    """Causal layers of two heads over n tokens."""
    with torch.no_grad():
        return hookattn.trace(Layers(*[2] * layers).eval(), (torch.randn(1, n, 24), None, causal(n)), **options)


TRACES: dict[str, Callable[[], hookattn.Trace]] = {
    "statistics alone": lambda: made(capture=("entropy", "received")),
    "mask alone": lambda: made(capture=("mask",)),
    "q and k alone": lambda: made(capture=("q", "k")),
    "no tokens": made,
    "one token": lambda: made(1, tokens=["one"]),
    "a hundred layers": lambda: made(3, 100),
}
HELP = ("capture=", "Trace again", "trace again")


@pytest.mark.parametrize("bare", TRACES)
def test_every_view_shows_what_there_is_and_says_what_is_missing(open_page: Open, tmp_path: Path, bare: str) -> None:
    page = open_page()
    page.goto(Path(render.save_page(TRACES[bare](), tmp_path / "t.html")).as_uri())
    page.get_by_role("tab").first.wait_for()
    names = page.get_by_role("tab").all_text_contents()
    assert len(names) >= 7
    for name in names:
        page.get_by_role("tab", name=name, exact=True).click()
        page.wait_for_timeout(350)
        figure = page.locator("[data-view]")
        assert "…" not in figure.inner_text().removesuffix("…")[-3:], (name, figure.inner_text())
        drawn = figure.locator("canvas, svg path, svg circle, table").count() > 0
        told = " ".join(figure.locator("[role=alert], [role=note]").all_text_contents())
        assert drawn or any(word in told for word in HELP), (name, figure.inner_text())
        assert "undefined" not in page.locator(".ha").inner_text() and "NaN" not in page.locator(".ha").inner_text()
        if AXE.is_file():
            assert not violations(page), name


BROWSERS = {
    "workers": "delete globalThis.Worker;",
    "workers that start": "globalThis.Worker = class { constructor() { throw new Error('forbidden'); } };",
    "WebGL": """const real = HTMLCanvasElement.prototype.getContext;
      HTMLCanvasElement.prototype.getContext = function (kind, ...more) {
        return kind.startsWith("webgl") ? null : real.call(this, kind, ...more); };""",
}


@pytest.mark.parametrize("without", BROWSERS)
def test_a_browser_that_lacks_something(open_page: Open, file: Path, tmp_path: Path, without: str) -> None:
    page = open_page()
    page.add_init_script(BROWSERS[without])
    compact = Path(hookattn.load(file).save(tmp_path / "c.safetensors", compact=True))
    show(page, compact)
    for name in page.get_by_role("tab").all_text_contents():
        page.get_by_role("tab", name=name, exact=True).click()
        page.locator("[data-view] :is(canvas, svg path, svg circle, table)").first.wait_for(state="attached")
    page.evaluate("viewer.set({view: 'flow'})")
    page.locator(".as-table summary", has_text="rollout").wait_for()
    page.wait_for_function("viewer.findings.done === viewer.findings.total")
    assert state(page)["view"] == "flow"
