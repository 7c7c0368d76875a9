"""marimo with a kernel, as an app and in its editor: what cells show, the widget, its keys, and its state."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest

pytest.importorskip("marimo")

from tests.notebooks.conftest import Tabs
from tests.notebooks.servers import SET_UP, marimo, sizes, view

pytestmark = pytest.mark.notebook

# Cells: what each takes of others, its code, and what it defines. A widget that other cells follow is wrapped for
# marimo; the other one is shown as it is.
CELLS = [
    ("", "import marimo as mo" + SET_UP, "mo, render, trace"),
    ("trace", "trace", ""),
    ("trace", "trace[0]", ""),
    ("mo, render, trace", "made = render.show(trace)\nwidget = mo.ui.anywidget(made)\nwidget", "made, widget"),
    ("mo, widget", "mo.md(f\"seen: {widget.value['state'].get('view')}\")", ""),
    (
        "mo, made",
        "mo.ui.button(label='to layer 0', on_click=lambda _: setattr(made, 'state', "
        "{'view': 'matrix', 'layer': 0, 'heads': [2]}))",
        "",
    ),
    ("render, trace", "render.show(trace, state={'view': 'matrix'}, theme='dark')", ""),
]


def source() -> str:
    """A notebook of marimo, which is a file of Python."""
    cells = ""
    for takes, code, defines in CELLS:
        returned = f"({defines},)" if defines else ""
        cells += f"@app.cell\ndef _({takes}):\n{indent(code.strip(), '    ')}\n    return {returned}\n\n\n"
    return f"import marimo\n\napp = marimo.App()\n\n\n{cells}if __name__ == '__main__':\n    app.run()\n"


@pytest.fixture(scope="module", params=["run", "edit"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(mode: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(mode) / "app.py"
    made.write_text(source())
    return made


@pytest.fixture(scope="module")
def ran(mode: str, path: Path, tabs: Tabs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The notebook in a tab, run, with both viewers drawn."""
    with marimo(tmp_path_factory.mktemp("settings"), mode, path) as url:
        tab = tabs.open(url, color_scheme="light")
        if mode == "edit":
            tab.get_by_text("mo.ui.anywidget").first.wait_for(timeout=60_000)
            tab.keyboard.press("Control+Shift+R")  # run all cells
        for i in range(2):
            tab.locator(".ha").nth(i).locator(".figure canvas").first.wait_for(timeout=90_000)
        yield tab
        tab.close()


@pytest.fixture
def viewer(ran: Any) -> Any:
    """The viewer of the first widget, clicked, in its first view."""
    found = ran.locator(".ha").first
    found.locator("h1").click()
    ran.keyboard.press("1")
    found.locator("[data-view=overview]").wait_for()
    return found


def test_a_cell_that_ends_in_a_trace_or_a_call_shows_it(ran: Any) -> None:
    assert ran.get_by_text("Trace(2 calls of InductionTransformer)", exact=True).is_visible()
    assert sizes(ran.locator("img[alt*='heads of']")) == [(4 * 17 + 3 * 3, 17)] * 2
    assert ran.get_by_text("faithful: output").is_visible()
    assert sizes(ran.locator("img[alt^='head ']")) == [(102, 102)] * 4


def test_the_widget_is_there(ran: Any, viewer: Any) -> None:
    assert ran.locator(".ha").count() == 2
    assert "4 induction heads" in viewer.locator(".figure").inner_text()
    # Its own theme, whatever the page's is; the other follows the page.
    assert ran.locator(".ha").nth(1).get_attribute("data-theme") == "dark"
    assert viewer.get_attribute("data-theme") == ran.evaluate("document.body.dataset.theme") == "light"


def test_a_plain_widget_reads_from_the_kernel(ran: Any) -> None:
    plain = ran.locator(".ha").nth(1)
    assert view(plain) == "Matrix"
    plain.locator("h1").click()
    ran.keyboard.press("4")
    plain.locator("[data-view=model] canvas").first.wait_for()
    ran.keyboard.press("3")
    plain.locator("[data-view=matrix]").wait_for()


def test_a_cell_follows_the_selection_and_sets_it(ran: Any, viewer: Any) -> None:
    viewer.get_by_role("tab", name="Heads").click()
    ran.get_by_text("seen: head", exact=True).wait_for(timeout=10_000)
    ran.get_by_role("button", name="to layer 0").click()
    viewer.locator("header", has_text="layer 0").wait_for(timeout=10_000)
    viewer.locator(".plane canvas").first.wait_for()
    assert viewer.locator(".chips [aria-pressed=true]").all_inner_texts() == ["2"]


def test_keys_in_the_viewer_are_not_the_notebooks(ran: Any, viewer: Any, path: Path) -> None:
    cells = "() => [...document.querySelectorAll('[data-cell-id]')].map((cell) => cell.dataset.cellId)"
    before = ran.evaluate(cells), path.read_text()
    for key in "ddxabjkcv":
        ran.keyboard.press(key)
    for key in ("Enter", "ArrowDown", "Escape"):
        ran.keyboard.press(key)
    ran.keyboard.press("3")
    viewer.locator("[data-view=matrix]").wait_for()
    ran.wait_for_timeout(300)
    assert (ran.evaluate(cells), path.read_text()) == before
    assert ran.locator("[role=dialog]:visible").count() == 0


def test_keys_in_the_notebook_are_not_the_viewers(ran: Any, viewer: Any, mode: str) -> None:
    if mode == "run":
        assert ran.locator(".cm-content").count() == 0  # an app has no cell to type in
        return
    code = ran.locator(".cm-content").filter(has_text=re.compile(r"^trace\[0\]$"))
    code.click()
    ran.keyboard.press("End")
    ran.keyboard.type("2]fm")
    assert view(viewer) == "Overview"
    for _ in "2]fm":
        ran.keyboard.press("Backspace")
    assert code.inner_text().strip() == "trace[0]"
