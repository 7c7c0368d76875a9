"""Attention over the patches of a picture: every number where its patch is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn.render.options import viewer_options
from tests.browser.conftest import rows_of_table, show, state

pytest.importorskip("transformers")
from tests import tiny_models as tiny

pytestmark = pytest.mark.browser
Open = Callable[..., Any]
PANEL = "[data-view=image] .panel[data-head='{}']"


def seen(tmp_path: Path, size: tuple[int, int] = (16, 16), **options: Any) -> tuple[hookattn.Trace, Path]:
    """A vision transformer over patches of 4 × 4 pixels, with a class token; two pictures."""
    model = tiny.build("ViTModel", "ViTConfig", **tiny.SMALL, image_size=size, patch_size=4)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    made = hookattn.trace(model, {"pixel_values": pixels}, **options)
    return made, Path(made.save(tmp_path / "t.safetensors"))


def picture(tmp_path: Path, name: str = "a.png", size: tuple[int, int] = (16, 16)) -> str:
    """A file of a picture whose left half is red and whose right half is blue."""
    image = pytest.importorskip("PIL.Image")
    made = image.new("RGB", size, (0, 0, 255))
    made.paste((255, 0, 0), (0, 0, size[0] // 2, size[1]))
    made.save(tmp_path / name)
    return str(tmp_path / name)


def pictures(tmp_path: Path, **more: Any) -> str:
    return json.dumps(viewer_options(images={"urls": [picture(tmp_path)] * 2, **more})["images"])


def hover(page: Any, panel: str, row: int, col: int, grid: tuple[int, int]) -> str:
    box = page.locator(f"{panel} canvas").bounding_box()
    x = box["x"] + (col + 0.5) * box["width"] / grid[1]
    page.mouse.move(x, box["y"] + (row + 0.5) * box["height"] / grid[0])
    return str(page.locator("[data-view=image] .readout").inner_text())


PIXEL = """([selector, x, y]) => {
  const c = document.querySelector('#viewer').shadowRoot.querySelector(selector + ' canvas');
  return [...c.getContext('2d').getImageData(Math.floor(x * c.width), Math.floor(y * c.height), 1, 1).data]; }"""


def test_the_class_token_looks_at_patches(open_page: Open, tmp_path: Path) -> None:
    trace, path = seen(tmp_path)
    page = show(open_page(), path, "{state: {view: 'image', layer: 1, batch: 1}}")
    weights = trace[1].weights[1, :, 0]
    for head, row, col in [(0, 0, 0), (3, 2, 1), (1, 3, 3)]:
        text = hover(page, PANEL.format(head), row, col, (4, 4))
        assert text.startswith(f"class token → row {row}, column {col}: ")
        said = [float(part.split()[-1].replace("−", "-")) for part in text.split(": ")[1].split(" · ")]
        assert said == pytest.approx(weights[:, 1 + 4 * row + col].tolist(), rel=1e-6)
    labels = page.locator(f"{PANEL.format(2)} .label").all_text_contents()
    assert labels[0] == "head 2"
    before, inside = float(labels[2].split()[-1]), float(labels[1].split()[-1])
    assert before == pytest.approx(weights[2, 0].item(), rel=1e-3)
    assert inside == pytest.approx(weights[2, 1:].sum().item(), rel=1e-3)


def test_the_strongest_patch_has_the_strongest_colour(open_page: Open, tmp_path: Path) -> None:
    trace, path = seen(tmp_path)
    page = show(open_page(), path, "{state: {view: 'image', heads: [1]}, theme: 'light'}")
    page.locator(PANEL.format(1)).wait_for()
    page.wait_for_timeout(200)
    weights = trace[0].weights[0, 1, 0, 1:]
    colours = [page.evaluate(PIXEL, [PANEL.format(1), (i % 4 + 0.3) / 4, (i // 4 + 0.3) / 4]) for i in range(16)]
    darkness = torch.tensor([-float(sum(c[:3])) for c in colours])
    assert colours[int(weights.argmax())][:3] == [5, 31, 66]  # the end of the ramp
    assert bool((darkness[weights.argsort()].diff() >= 0).all()) and len(set(darkness.tolist())) > 4


def test_a_click_makes_a_patch_the_query_and_arrows_move_it(open_page: Open, tmp_path: Path) -> None:
    trace, path = seen(tmp_path)
    page = show(open_page(), path, "{state: {view: 'image', heads: [2, 0]}}")
    page.locator(PANEL.format(0)).wait_for()
    picker = page.locator("[data-view=image] .panel").first
    box = picker.locator("canvas").bounding_box()
    page.mouse.click(box["x"] + 0.6 * box["width"], box["y"] + 0.4 * box["height"])
    page.wait_for_function("viewer.state.query === 1 + 4 + 2")
    for key, query in [("ArrowDown", 11), ("ArrowRight", 12), ("ArrowRight", 12), ("ArrowUp", 8), ("ArrowLeft", 7)]:
        picker.press(key)
        page.wait_for_function(f"viewer.state.query === {query}")
    page.locator(".as-table summary", has_text="row 1, column 2").wait_for()
    weights = trace[0].weights[0, 2, 7]
    found = [(k, w) for head, k, w in rows_of_table(page) if head == "2"]
    order = weights.argsort(descending=True).tolist()[: len(found)]
    names = ["class token" if s == 0 else f"row {(s - 1) // 4}, column {(s - 1) % 4}" for s in order]
    assert [k for k, _ in found] == names
    assert [w for _, w in found] == pytest.approx(weights[order].tolist(), rel=1e-6)
    page.get_by_role("button", name="class token").click()
    page.wait_for_function("viewer.state.query === 0")
    page.locator(PANEL.format(2)).locator("canvas").click()  # a head's patches are to be clicked, too
    page.wait_for_function("viewer.state.query > 0")


def test_the_picture_is_where_its_patches_are(open_page: Open, tmp_path: Path) -> None:
    _, path = seen(tmp_path)
    page = show(open_page(), path, f"{{images: {pictures(tmp_path)}, state: {{view: 'image', heads: [0]}}}}")
    page.locator(PANEL.format(0)).wait_for()
    page.wait_for_timeout(300)
    first = "[data-view=image] .panel:not([data-head])"
    assert page.evaluate(PIXEL, [first, 0.3, 0.3]) == [255, 0, 0, 255]
    assert page.evaluate(PIXEL, [first, 0.8, 0.3]) == [0, 0, 255, 255]
    assert page.evaluate(PIXEL, [PANEL.format(0), 0.3, 0.3]) not in ([255, 0, 0, 255], [0, 0, 255, 255])


@pytest.mark.parametrize("given", [{"grid": (4, 6)}, {"grid": (4, 6), "prefix": 1}])
def test_a_grid_that_is_no_square(open_page: Open, tmp_path: Path, given: dict[str, Any]) -> None:
    trace, path = seen(tmp_path, (16, 24))
    images = pictures(tmp_path, **given)
    page = show(open_page(), path, f"{{images: {images}, state: {{view: 'image', heads: [3]}}}}")
    text = hover(page, PANEL.format(3), 3, 5, (4, 6))
    assert float(text.split()[-1]) == pytest.approx(trace[0].weights[0, 3, 0, 24].item(), rel=1e-6)


def test_keys_that_are_no_grid_say_what_to_hand_over(open_page: Open, tmp_path: Path) -> None:
    _, path = seen(tmp_path, (8, 24))
    page = show(open_page(), path, "{state: {view: 'image'}}")
    told = page.get_by_role("note").filter(has_text="13 keys").inner_text()
    assert '"grid": (rows, columns)' in told


def test_rows_that_were_not_kept_cannot_be_chosen(open_page: Open, tmp_path: Path) -> None:
    trace, path = seen(tmp_path, queries=[5, 9])
    page = show(open_page(), path, "{state: {view: 'image', heads: [1], query: 1}}")
    text = hover(page, PANEL.format(1), 0, 2, (4, 4))
    assert text.startswith("row 2, column 0 → row 0, column 2")
    assert float(text.split()[-1]) == pytest.approx(trace[0].weights[0, 1, 1, 3].item(), rel=1e-6)
    assert page.get_by_role("button", name="class token").is_disabled()


def test_text_has_no_picture(open_page: Open, file: Path, tmp_path: Path) -> None:
    page = show(open_page(), file, "{state: {view: 'image'}}")
    assert page.get_by_role("tab", name="Image").count() == 0 and state(page)["view"] == "overview"
    inputs = {"input_ids": torch.randint(3, 60, (1, 7)), "pixel_values": torch.randn(1, 3, 8, 8)}
    made = hookattn.trace(tiny.clip(), inputs)
    page = show(open_page(), Path(made.save(tmp_path / "c.safetensors")), "{state: {view: 'image', stack: 'text'}}")
    assert "Choose the attention of a vision stack" in page.get_by_role("note").inner_text()
    page.evaluate("viewer.set({stack: 'vision'})")
    page.locator(PANEL.format(0)).wait_for()


@pytest.mark.parametrize("width", [400, 3840])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_and_is_exported(open_page: Open, tmp_path: Path, width: int, theme: str) -> None:
    _, path = seen(tmp_path)
    options = f"{{images: {pictures(tmp_path)}, theme: '{theme}', state: {{view: 'image'}}}}"
    page = show(open_page(viewport={"width": width, "height": 900}), path, options)
    page.locator(PANEL.format(3)).wait_for()
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    svg = page.evaluate("viewer.svg()")
    assert svg.count("<image") == 5 and "class token" in svg and "var(--" not in svg


def test_what_is_not_there_names_the_capture(open_page: Open, tmp_path: Path) -> None:
    _, path = seen(tmp_path, capture=("scores",))
    page = show(open_page(), path, "{state: {view: 'image'}}")
    assert 'capture=("weights", …)' in page.get_by_role("alert").inner_text()


@pytest.mark.parametrize("sink", ["drop", "renormalise"])
def test_without_the_first_key(open_page: Open, tmp_path: Path, sink: str) -> None:
    trace, path = seen(tmp_path)
    page = show(open_page(), path, f"{{state: {{view: 'image', heads: [2], sink: '{sink}', query: 6}}}}")
    weights = trace[0].weights[0, 2, 6].double()
    expected = weights[10] / (1 - weights[0]) if sink == "renormalise" else weights[10]
    text = hover(page, PANEL.format(2), 2, 1, (4, 4))
    assert float(text.split()[-1]) == pytest.approx(expected.item(), rel=1e-5)
    assert "class token left out" in page.locator(f"{PANEL.format(2)} .label").all_text_contents()


def test_who_hands_in_a_picture_sees_it(open_page: Open, tmp_path: Path) -> None:
    _, file = seen(tmp_path)
    page = show(open_page(), file, f"{{images: {pictures(tmp_path)}}}", view=None)
    assert state(page)["view"] == "overview"
    page = show(open_page(), file, f"{{images: {pictures(tmp_path)}, state: {{view: 'matrix'}}}}")
    assert state(page)["view"] == "matrix"
