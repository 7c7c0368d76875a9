"""What was edited in a call stands beside its certificate, and marks the heads, queries and keys that it names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn import edit
from tests.browser.conftest import ORIGIN, TOKENS, Layers, assert_fits, causal, serve, show, state

pytestmark = pytest.mark.browser
Open = Callable[..., Any]

EDITS = (
    edit.zero("weights", layer=1, heads=[1], queries=[4, 5], keys=[0, 2]),
    edit.scale("output", 0.5, layer=1, heads=[3], batch=[1], queries=[7]),
)


def traced(*edits: hookattn.edit.Edit) -> hookattn.Trace:
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        return hookattn.edited(Layers(4, 4).eval(), (x, None, causal(9)), *edits, tokens=TOKENS)


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(traced(*EDITS).save(tmp_path_factory.mktemp("edited") / "edited.safetensors"))


def marked(page: Any) -> list[str]:
    return [str(text) for text in page.locator(".figure text.edited").all_text_contents()]


def test_a_badge_says_what_was_edited(open_page: Open, edited: Path) -> None:
    page = show(open_page(), edited, "{state: {view: 'matrix', layer: 1, heads: [1]}}")
    badge = page.locator("header .badge.edited")
    assert badge.inner_text().split("\n")[-1] == (
        "edited: zero(weights) head 1, query 4 5, key 0 2; scale(output) head 3, query 7, batch entry 1"
    )
    assert page.locator(".chip", has=page.locator(".mark")).count() == 2
    assert "edited: zero(weights)" in page.get_by_role("button", name="Head 1,").get_attribute("title")
    page.evaluate("viewer.set({layer: 0})")
    assert page.locator(".badge.edited").count() == 0 and page.locator(".mark").count() == 0


@pytest.mark.parametrize("view", ["matrix", "head"])
def test_the_queries_and_keys_of_the_heads_in_view_are_marked(open_page: Open, edited: Path, view: str) -> None:
    page = show(open_page(), edited, f"{{state: {{view: '{view}', layer: 1, heads: [1]}}}}")
    page.locator(".figure text.edited").first.wait_for()
    assert sorted(marked(page)) == sorted([*("猫 1/2", "猫 2/2"), *("<s>", "cat")])
    page.evaluate("viewer.set({heads: [0]})")
    page.wait_for_timeout(200)
    assert marked(page) == []
    page.evaluate("viewer.set({heads: [3]})")
    page.wait_for_timeout(200)
    assert marked(page) == []  # its edit is of the other batch entry
    page.evaluate("viewer.set({batch: 1})")
    page.locator(".figure text.edited").first.wait_for()
    assert marked(page) == ["שלום"]


def test_the_lens_does_not_explain_what_was_set(open_page: Open, edited: Path) -> None:
    page = show(open_page(), edited, "{state: {view: 'lens', layer: 1, heads: [1], query: 5, key: 2}}")
    page.locator(".verdict").wait_for()
    assert "an edit set it while the model ran" in page.locator(".verdict").inner_text()
    assert page.locator(".figure .notice").count() == 0
    page.evaluate("viewer.set({key: 1})")
    page.wait_for_function(
        "!document.querySelector('#viewer').shadowRoot.querySelector('.verdict').innerText.includes('an edit set it')"
    )


def test_the_model_and_the_certificates_name_the_calls(open_page: Open, edited: Path) -> None:
    page = show(open_page(), edited, "{state: {view: 'model'}}")
    assert page.locator(".row-name .badge.edited").count() == 1 and page.locator(".tile .mark").count() == 2
    page.evaluate("viewer.set({view: 'certificates'})")
    page.locator("p.edited").wait_for()
    assert "; 1 were edited" in page.locator(".readout").first.inner_text()
    assert "scale(output) head 3, query 7, batch entry 1" in page.locator("p.edited").inner_text()


def test_clean_and_edited_side_by_side(open_page: Open, edited: Path, tmp_path: Path) -> None:
    clean = Path(traced(edit.set("v", 0.0, layer=0, heads=[0], keys=[0])).save(tmp_path / "clean.safetensors"))
    page = open_page(viewport={"width": 1500, "height": 1000})
    serve(page, {"edited.safetensors": edited})
    chosen = json.dumps({"view": "compare", "layer": 1, "heads": [1]})
    page = show(page, clean, f"{{compare: await served('/edited.safetensors'), state: {chosen}}}")
    page.locator("[data-side=difference] canvas").wait_for()
    (badge,) = page.locator(".panels .badge.edited").all()
    assert badge.get_attribute("data-edited").startswith("edited: zero(weights) head 1, query 4 5, key 0 2")
    assert page.locator("header .badge.edited").count() == 0
    assert len(marked(page)) == 8  # of B, and of the difference
    assert_fits(page)


def test_weights_below_0_are_drawn_as_such(open_page: Open, tmp_path: Path) -> None:
    trace = traced(edit.scale("weights", -1.0, layer=0, heads=[1]))
    page = show(open_page(), Path(trace.save(tmp_path / "below.safetensors")), "{state: {view: 'matrix', heads: [1]}}")
    page.locator(".plane canvas").wait_for()
    assert "-1" in page.locator(".foot, .figure").first.inner_text().replace("−", "-")


@pytest.mark.parametrize("when", ["opened", "later", "set"])
def test_a_link_to_a_view_that_is_not_there_leads_to_one_that_is(open_page: Open, edited: Path, when: str) -> None:
    """Compare without a second trace has no tab, and raised where a link named it."""
    fragment = "#" + json.dumps({"view": "compare", "layer": 1})
    page = show(open_page(), edited, "{link: true}", fragment if when == "opened" else "")
    if when == "later":
        page.evaluate(f"location.hash = {json.dumps(fragment)}")
        page.wait_for_function("viewer.state.layer === 1")
    elif when == "set":
        page.evaluate("viewer.set({view: 'compare', layer: 1})")
    found = state(page)
    assert found["view"] == "overview" and found["layer"] == 1
    assert page.get_by_role("tab", selected=True).inner_text() == "Overview"
    assert page.locator(".figure svg").first.is_visible() and ORIGIN in page.url
