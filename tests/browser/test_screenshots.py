"""Each view looks as it did when somebody looked at it last, in both themes.

The pictures in ``screenshots/`` are a quarter of the size, in grey. Fonts differ from machine to machine by a little;
what has moved, is gone or came to be differs by much. With ``HOOKATTN_SCREENSHOTS=write`` set, these tests write them
anew, to be looked at.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import analyze, render
from tests.browser.conftest import VIEWER

image = pytest.importorskip("PIL.Image")
numpy = pytest.importorskip("numpy")
pytest.importorskip("pandas")

pytestmark = pytest.mark.browser
KEPT = Path(__file__).parent / "screenshots"
TOKENS = "[CLS] the cat sat on the mat . [SEP] the cat lay on the rug . [SEP]".split()
BLOCK = 8
MEAN, LARGEST = 0.012, 0.08
"""How far a picture may be from the one kept, of 1: in the mean, and in any block of 8 × 8 points."""

MEASURE = """() => {
  const c = document.createElement("canvas").getContext("2d");
  c.font = "14px system-ui";
  return c.measureText("The quick brown fox jumps over the lazy dog, 0123456789").width; }"""
WIDTH = 412.86
"""Of that sentence in the font of the pictures."""

VIEWS: dict[str, dict[str, Any]] = {
    "overview": {"layer": 1, "heads": [2], "query": 6, "key": 2},
    "head": {"layer": 1, "heads": [1, 2, 3]},
    "matrix": {"layer": 1, "heads": [2], "field": "scores"},
    "model": {},
    "neuron": {"layer": 0, "heads": [1], "query": 6},
    "lens": {"layer": 0, "heads": [1], "query": 6, "key": 2},
    "flow": {},
    "image": {"layer": 2, "heads": [0, 1], "query": 6},
    "compare": {"layer": 1, "heads": [2]},
    "certificates": {},
}


class Wave(nn.Module):
    """Attention whose queries and keys are waves: the same numbers everywhere, and patterns that an eye can tell."""

    def __init__(self, layer: int, phase: float) -> None:
        super().__init__()
        self.layer, self.phase = layer, phase

    def forward(self, at: Tensor) -> Tensor:
        """B 1 T 1 to B 4 T 8."""
        rate = torch.arange(1, 9) * (0.15 + 0.1 * self.layer) + torch.arange(4).view(4, 1, 1) * 0.2
        q, k = 2 * torch.sin(at * rate + self.phase), 2 * torch.sin((at + self.layer) * rate)
        return nn.functional.scaled_dot_product_attention(q, k, torch.cos(at * rate))


class Waves(nn.Module):
    """Three layers of it."""

    def __init__(self, phase: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Wave(layer, phase) for layer in range(3))

    def forward(self, at: Tensor) -> list[Tensor]:
        """B 1 T 1 to B 4 T 8, of each layer."""
        return [layer(at) for layer in self.layers]


@pytest.fixture(scope="module")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A page of a trace, as a file's address."""
    folder = tmp_path_factory.mktemp("screenshots")
    x = torch.arange(1.0, 18.0).view(1, 1, 17, 1)
    one, other = (hookattn.trace(Waves(phase), x, tokens=TOKENS, verify="full") for phase in (0.0, 0.7))
    scores = analyze.report(one)
    picture = image.new("RGB", (64, 64), (40, 90, 160))
    picture.paste((230, 200, 90), (0, 0, 32, 64))
    picture.save(folder / "picture.png")

    def make(view: str, theme: str) -> str:
        path = folder / f"{view}.{theme}.html"
        state = {"view": view, **VIEWS[view]}
        given: dict[str, Any] = {"state": state, "scores": scores, "theme": theme, "title": view}
        if view == "image":
            given["images"] = {"urls": [str(folder / "picture.png")], "grid": (4, 4), "prefix": 1}
        if view == "compare":
            given["compare"] = other
        path.write_text(render.page(one, **given), encoding="utf-8")
        return path.as_uri()

    return make


def grey(png: bytes) -> Any:
    """A screenshot at a quarter of its size, in grey."""
    whole = image.open(io.BytesIO(png)).convert("L")
    return whole.resize((whole.width // 4, whole.height // 4), image.Resampling.BOX)


def apart(one: Any, other: Any) -> tuple[float, float]:
    """The mean difference of two pictures, and the largest of any block, of 1."""
    if one.size != other.size:
        return 1.0, 1.0
    a, b = (numpy.asarray(x, dtype=float) / 255 for x in (one, other))
    rows, columns = (n // BLOCK * BLOCK for n in a.shape)
    blocks = (a - b)[:rows, :columns].reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).mean((1, 3))
    return float(abs(a - b).mean()), float(abs(blocks).max())


def shot(page: Any, address: str) -> bytes:
    page.goto(address)
    page.locator("[data-view]").first.wait_for(state="attached", timeout=20_000)
    page.wait_for_load_state("networkidle")
    before = b""
    for _ in range(40):  # until nothing moves any more
        page.wait_for_timeout(250)
        now = bytes(page.screenshot())
        if now == before:
            return now
        before = now
    raise AssertionError("the page does not come to rest")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_looks_as_it_did(open_page: Callable[..., Any], page_of: Callable[..., str], view: str, theme: str) -> None:
    page = open_page(viewport={"width": 1120, "height": 800})
    found = grey(shot(page, page_of(view, theme)))
    width = page.evaluate(MEASURE)
    if abs(width - WIDTH) > 0.5:
        pytest.skip(f"the pictures were drawn in DejaVu Sans; here system-ui is another font ({width:.1f} wide)")
    kept = KEPT / f"{view}.{theme}.png"
    if os.environ.get("HOOKATTN_SCREENSHOTS") == "write":
        found.save(kept, optimize=True)
    mean, largest = apart(found, image.open(kept).convert("L"))
    assert mean <= MEAN and largest <= LARGEST, f"{kept.name}: mean {mean:.4f}, largest of a block {largest:.3f}"


def test_a_changed_page_is_found(open_page: Callable[..., Any], page_of: Callable[..., str]) -> None:
    """The bounds are narrow enough: a control that is gone, another head."""
    page = open_page(viewport={"width": 1120, "height": 800})
    kept = grey(shot(page, page_of("matrix", "light")))
    page.evaluate("document.querySelectorAll('*').forEach(e => e.shadowRoot?.querySelector('.control')?.remove())")
    page.wait_for_timeout(200)
    assert apart(grey(page.screenshot()), kept)[1] > LARGEST
    other = page_of("head", "light")
    first = grey(shot(page, other))
    page.goto(other.split("#")[0] + "#" + json.dumps({**VIEWS["head"], "view": "head", "heads": [0]}))
    page.reload()
    page.wait_for_timeout(1500)
    assert apart(grey(page.screenshot()), first)[1] > LARGEST


def test_every_view_is_here() -> None:
    source = (VIEWER / "src" / "views" / "index.ts").read_text(encoding="utf-8")
    listed = source.split("VIEWS: readonly View[] = [")[1].split("]")[0]
    assert {name.strip() for name in listed.split(",")} == set(VIEWS)
