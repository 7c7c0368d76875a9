"""The module's default export: the front end of a notebook widget, with a kernel that the test plays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from tests.browser.conftest import ORIGIN, VIEWER, Layers, serve

pytestmark = pytest.mark.browser

PAGE = """<!doctype html><div id="viewer"></div><script type="module">
import widget from "/hookattn-viewer.js";
const bytes = await (await fetch("/trace.safetensors")).arrayBuffer();
const listeners = {};
window.traits = {
  _size: bytes.byteLength, _name: "run.safetensors", options: { theme: "dark" }, state: { view: "head", layer: 1 },
};
window.reads = []; window.broken = false; window.saved = 0; window.listeners = listeners;
window.tell = (event, ...args) => [...(listeners[event] ?? [])].forEach((listen) => listen(...args));
const model = {
  get: (name) => traits[name],
  set: (name, value) => (traits[name] = value),
  save_changes: () => saved++,
  on: (event, listener) => (listeners[event] ??= []).push(listener),
  off: (event, listener) => (listeners[event] = listeners[event].filter((x) => x !== listener)),
  send({ kind, id, start, end }) {
    reads.push([kind, start, end]);
    // As a part of a larger buffer, and beside an answer that another view of the same model asked for.
    const buffer = new Uint8Array(end - start + 16);
    buffer.set(new Uint8Array(bytes, start, end - start), 8);
    setTimeout(() => tell("msg:custom", { kind: "bytes", id: "another-0" }, [new DataView(new ArrayBuffer(4))]));
    setTimeout(() => broken ? tell("msg:custom", { kind: "error", id, message: "the file is gone" }, [])
      : tell("msg:custom", { kind: "bytes", id }, [new DataView(buffer.buffer, 8, end - start)]));
  },
};
window.close_ = widget.render({ model, el: document.getElementById("viewer") });
</script>"""


@pytest.fixture
def page(open_page: Callable[..., Any], file: Path) -> Any:
    return opened(open_page, file)


def opened(open_page: Callable[..., Any], file: Path) -> Any:
    made = open_page()
    files = {"index.html": PAGE, "hookattn-viewer.js": VIEWER / "hookattn-viewer.js", "trace.safetensors": file}
    serve(made, files)
    made.goto(f"{ORIGIN}/index.html")
    made.locator("[data-view=head] path").first.wait_for(state="attached")
    return made


def offsets(file: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor is in the file."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    return {name: tuple(8 + length + x for x in entry["data_offsets"]) for name, entry in header.items()}


def read(page: Any) -> int:
    """Bytes that the kernel was asked for."""
    return int(page.evaluate("reads.reduce((n, [, start, end]) => n + end - start, 0)"))


def test_it_reads_from_the_kernel_only_what_it_shows(page: Any, file: Path) -> None:
    assert page.locator("h1").inner_text() == "run.safetensors"
    assert page.locator(".ha").get_attribute("data-theme") == "dark"
    reads = page.evaluate("reads")
    assert {kind for kind, _, _ in reads} == {"read"} and reads[0][1:] == [0, 8]
    places = offsets(file)
    asked = [name for _, start, _ in reads[2:] for name, (first, last) in places.items() if first <= start < last]
    assert asked and {name.split("/")[-1] for name in asked} <= {"weights", "000"}
    # What is in view comes first, and then what is measured: nothing of the other layer before all of this one.
    layers = [name.split("/")[1] for name in asked if name.startswith("calls/")]
    assert layers[0] == "0001" and layers == sorted(layers, reverse=True)


def test_a_kernel_is_not_asked_for_everything_at_once(open_page: Callable[..., Any], tmp_path: Path) -> None:
    """The layer in view is measured, and others as far as may be read ahead; the rest when it is looked at."""
    made = hookattn.trace(Layers(4, 4, 4).eval(), torch.randn(1, 700, 24), capture=("weights",))
    file = Path(made.save(tmp_path / "large.safetensors"))
    page = opened(open_page, file)
    later = page.get_by_text("measured when their layer is opened")
    page.evaluate("() => { traits.state = { ...traits.state, view: 'overview', layer: 1 }; tell('change:state'); }")
    later.wait_for()
    page.wait_for_timeout(300)
    head = 4 * 700 * 700
    assert later.inner_text().split()[-1] == "4"
    assert 8 * head <= read(page) < 11 * head
    page.evaluate("() => { traits.state = { ...traits.state, layer: 2 }; tell('change:state'); }")
    later.wait_for(state="detached")
    assert read(page) >= 12 * head


def test_the_selection_goes_both_ways(page: Any) -> None:
    assert "layer 1" in page.locator("header").inner_text()
    page.get_by_role("button", name="Head 2", exact=True).click()
    assert page.evaluate("[traits.state.layer, traits.state.heads]") == [1, [2]]
    saved = page.evaluate("saved")
    page.evaluate("() => { traits.state = { ...traits.state, layer: 0, view: 'matrix' }; tell('change:state'); }")
    page.locator(".plane canvas").wait_for()
    assert "layer 0" in page.locator("header").inner_text()
    assert page.evaluate("saved") - saved <= 1, "an echo"


def test_an_error_of_the_kernel_is_shown(page: Any) -> None:
    """At what was not read before: weights of all layers were, for what is found of their heads."""
    page.wait_for_timeout(1000)
    page.evaluate("broken = true")
    page.evaluate("() => { traits.state = { ...traits.state, layer: 0, view: 'neuron' }; tell('change:state'); }")
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").inner_text() == "the file is gone"


def test_a_view_that_is_closed_leaves_no_listener(page: Any) -> None:
    page.evaluate("close_()")
    assert page.evaluate("Object.values(listeners).flat().length") == 0
    assert page.locator(".ha").count() == 0


HEARD = """() => {
  window.heard = [];
  document.addEventListener("keydown", (event) => heard.push(event.key));
}"""


def test_plain_keys_stay_in_the_viewer(page: Any) -> None:
    """In a notebook two times d delete the cell, and x cuts it: no key that the viewer has no use for may get there."""
    page.evaluate(HEARD)
    page.locator("h1").click()
    for key in ("d", "d", "x", "Shift+A", "2", "Enter", "ArrowDown"):
        page.keyboard.press(key)
    assert page.evaluate("heard") == []
    page.keyboard.press("Control+s")
    assert page.evaluate("heard") == ["Control", "s"] or page.evaluate("heard") == ["s"]
    page.evaluate("() => { document.body.tabIndex = 0; document.body.focus(); heard.length = 0; }")
    before = page.evaluate("traits.state")
    page.keyboard.press("2")
    assert page.evaluate("heard") == ["2"] and page.evaluate("traits.state") == before


def test_keys_of_the_help_are_its_own(page: Any) -> None:
    page.locator("h1").click()
    page.keyboard.press("?")
    page.locator("dialog[open]").wait_for()
    before = page.evaluate("traits.state")
    page.keyboard.press("3")
    page.keyboard.press("Escape")
    page.locator("dialog.help").wait_for(state="hidden")
    assert page.evaluate("traits.state") == before
    page.keyboard.press("3")
    assert page.evaluate("traits.state") != before
