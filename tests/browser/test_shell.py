"""What is around every view: links, keys, notices, export, colours, screens of any size."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn import Skipped
from hookattn.demo import induction
from tests.browser.conftest import VIEWER, Layers, rows_of_table, show, state

pytestmark = pytest.mark.browser
Open = Callable[..., Any]
VIEWS = ["head", "matrix", "model"]


def test_a_link_restores_the_selection(open_page: Open, file: Path) -> None:
    page = show(open_page(), file)
    page.keyboard.press("Tab")
    for key in ["3", "]", "l", ".", "ArrowDown", "ArrowDown", "ArrowRight"]:
        page.keyboard.press(key)
    wanted = {"view": "matrix", "layer": 1, "scale": "log", "query": 1, "key": 0}
    assert {k: state(page)[k] for k in wanted} == wanted
    again = show(open_page(), file, fragment=page.evaluate("location.hash"))
    assert state(again) == state(page)


def test_keys_work_as_soon_as_a_page_is_open(open_page: Open, file: Path) -> None:
    page = show(open_page(), file)
    for key in ["3", "]", "."]:
        page.keyboard.press(key)
    assert {k: state(page)[k] for k in ("view", "layer")} == {"view": "matrix", "layer": 1}
    page.keyboard.press("?")
    assert "once it was clicked" not in page.locator("dialog").inner_text()


def test_in_a_notebook_keys_wait_for_the_viewer_to_have_the_focus(open_page: Open, file: Path) -> None:
    page = show(open_page(), file, "{}")
    before = state(page)["view"]
    page.keyboard.press("3")
    assert state(page)["view"] == before
    page.locator(".controls").first.click(position={"x": 2, "y": 2})
    page.keyboard.press("3")
    assert state(page)["view"] == "matrix"
    page.keyboard.press("?")
    assert "once it was clicked" in page.locator("dialog").inner_text()


@pytest.mark.parametrize(
    "fragment",
    ['{"view":"nothing","layer":99,"heads":"x","zoom":[1],"__proto__":{"a":1},"toString":1}', "%", "null", "[1]", "{"],
)
def test_a_link_that_makes_no_sense_does_no_harm(open_page: Open, file: Path, fragment: str) -> None:
    page = show(open_page(), file, fragment="#" + fragment, view=None)
    assert (state(page)["view"], state(page)["zoom"]) == ("overview", None)
    assert state(page)["heads"] and set(state(page)["heads"]) <= {0, 1, 2, 3}


def test_a_missing_field_names_the_capture(open_page: Open, tmp_path: Path) -> None:
    made = hookattn.trace(Layers(2).eval(), (torch.randn(1, 5, 24),), capture=("q", "weights"))
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")), "{state: {view: 'matrix', field: 'scores'}}")
    assert 'capture=("scores", …)' in page.get_by_role("alert").inner_text()
    page.get_by_role("button", name="weights", exact=True).click()
    page.locator(".plane canvas").wait_for()


def test_unfaithful_calls_and_skipped_modules_are_told(open_page: Open, trace: hookattn.Trace, tmp_path: Path) -> None:
    worse = replace(trace[1].certificate, status="unfaithful", output_error=0.5)
    calls = [trace[0], replace(trace[1], certificate=worse)]
    made = replace(trace, calls=calls, skipped=[Skipped("mixer", "linear attention", (0,))])
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")))
    assert page.locator("header .badge").get_attribute("data-status") == "faithful"
    told = page.locator(".ha").inner_text()
    assert "1 of the 2 calls" in told and "could not be read" in told
    page.evaluate("viewer.set({layer: 1})")
    page.get_by_role("alert").wait_for()
    assert page.locator("header .badge").get_attribute("data-status") == "unfaithful"


def test_a_step_of_a_generation_counts_on(open_page: Open, tmp_path: Path) -> None:
    model = Layers(2).eval()
    x, y = torch.randn(1, 3, 24), torch.randn(1, 6, 24)
    with hookattn.tracing(model) as made:
        model(y, y)
        model(x, torch.cat([y, x], 1))
    made = replace(made, calls=[replace(c, site=replace(c.site, kind="self")) for c in made])
    options = "{state: {view: 'matrix', step: 1, heads: [1]}}"
    page = show(open_page(), Path(made.save(tmp_path / "t.safetensors")), options)
    weights = made[1].weights[0, 1]
    query, key = divmod(int(weights.argmax()), 9)
    first = rows_of_table(page)[0]
    assert first[:2] == (str(6 + query), str(key)) and first[2] == pytest.approx(weights.max().item())


PARSES = "text => new DOMParser().parseFromString(text, 'image/svg+xml').querySelector('parsererror') === null"
PNG = "viewer.png().then(b => b.arrayBuffer()).then(b => [b.byteLength, ...new Uint8Array(b).slice(1, 4)])"


@pytest.mark.parametrize("view", VIEWS)
def test_export_holds_what_is_drawn(open_page: Open, file: Path, view: str) -> None:
    page = show(open_page(), file, f"{{state: {{view: '{view}'}}}}")
    page.wait_for_timeout(600)
    svg = page.evaluate("viewer.svg()")
    assert page.evaluate(PARSES, svg)
    assert "var(--" not in svg and ("<path" if view == "head" else "<image") in svg
    if view != "model":
        assert "שלום" in svg and "&lt;/script&gt;" in svg
    size, *kind = page.evaluate(PNG)
    assert size > 3000 and bytes(kind) == b"PNG"


FITS = """() => { const f = document.querySelector('#viewer').shadowRoot.querySelector('.figure');
  return f.scrollWidth <= f.clientWidth; }"""


@pytest.mark.parametrize("width", [400, 3840])
@pytest.mark.parametrize("view", VIEWS)
def test_it_fits_small_and_large_screens(open_page: Open, file: Path, view: str, width: int) -> None:
    page = show(open_page(viewport={"width": width, "height": 900}), file, f"{{state: {{view: '{view}'}}}}")
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(FITS)


def test_every_control_has_a_name_and_is_reached_by_tab(open_page: Open, file: Path) -> None:
    page = show(open_page(), file, "{state: {view: 'matrix'}}")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.querySelector('#viewer').shadowRoot.activeElement?.outerHTML.slice(0, 90)"))
    controls = page.locator(".ha button:not([disabled]), .ha select, .ha input")
    visible = [c for c in controls.all() if c.is_visible()]
    assert len(reached - {None}) >= len(visible) > 20
    for control in visible:
        assert control.evaluate("c => (c.ariaLabel || c.textContent || c.labels?.[0]?.textContent || '').trim()")


def test_a_trained_model_opens_from_a_compact_file(open_page: Open, tmp_path: Path) -> None:
    with torch.no_grad():
        made = hookattn.trace(induction.load_pretrained(), induction.example_tokens())
    path = Path(made.save(tmp_path / "t.safetensors", compact=True))
    page = show(open_page(), path, "{state: {view: 'model'}}")
    assert "InductionTransformer" in page.locator("header").inner_text()
    assert page.locator(".tile").count() == 8


# ------------------------------------------------------------------------------------------------------------ colours

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB: what a dichromat sees.
DICHROMATS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


SHARED = json.loads((VIEWER.parent / "palette.json").read_text("utf-8"))


def hex_rgb(x: str) -> torch.Tensor:
    x = x.removeprefix("#")
    return torch.tensor([int(x[i : i + 2], 16) / 255 for i in (0, 2, 4)])


def colours(theme: str) -> dict[str, torch.Tensor]:
    """The variables of a theme, as linear RGB."""
    style = (VIEWER / "src" / "ui" / "style.css").read_text("utf-8")
    light, dark = re.findall(r"\{([^}]*--bg:[^}]*)\}", style)
    found = re.findall(r"--([\w-]+): #([0-9a-f]{6})", dark if theme == "dark" else light)
    rgb = {name: hex_rgb(x) for name, x in found}
    rgb |= {f"h{i}": hex_rgb(x) for i, x in enumerate(SHARED["heads"][theme])}
    return {name: torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) for name, x in rgb.items()}


def contrast(a: torch.Tensor, b: torch.Tensor) -> float:
    """WCAG 2's ratio of luminances."""
    one, other = sorted(float(x @ torch.tensor([0.2126, 0.7152, 0.0722])) + 0.05 for x in (a, b))
    return other / one


def lab(x: torch.Tensor) -> torch.Tensor:
    """CIE L*a*b* under D65."""
    matrix = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    f = (matrix @ x.clamp(0, 1) / torch.tensor([0.9505, 1.0, 1.089])).clamp(min=1e-6)
    f = torch.where(f > 0.008856, f ** (1 / 3), 7.787 * f + 16 / 116)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_legible(theme: str) -> None:
    of = colours(theme)
    for text, ground in itertools.product(["text", "muted"], ["bg", "panel", "hover"]):
        assert contrast(of[text], of[ground]) >= 4.5, (text, ground)
    for text in ["good", "bad", "warn", "accent"]:
        assert contrast(of[text], of["bg"]) >= 4.5, text
    assert contrast(of["accent-text"], of["accent"]) >= 4.5
    assert all(contrast(of[f"h{i}"], of["bg"]) >= 3 for i in range(8))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("eyes", ["all", *DICHROMATS])
def test_heads_are_told_apart_by_every_eye(theme: str, eyes: str) -> None:
    of = colours(theme)
    seen = torch.eye(3) if eyes == "all" else torch.tensor(DICHROMATS[eyes])
    places = [lab(seen @ of[f"h{i}"]) for i in range(8)]
    apart = {(i, j): float((places[i] - places[j]).norm()) for i, j in itertools.combinations(range(8), 2)}
    assert min(apart.values()) >= 25, {k: round(v, 1) for k, v in apart.items() if v < 25}
