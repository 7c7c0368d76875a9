"""JupyterLab with a kernel: what cells show, the widget and its keys, and what is left when the kernel has ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jupyterlab")

import nbformat

from tests.notebooks.conftest import Tabs
from tests.notebooks.servers import SET_UP, environment, jupyterlab, sizes, view

pytestmark = pytest.mark.notebook

CELLS = [
    SET_UP,
    "trace",
    "trace[0]",
    "widget, seen = render.show(trace), []\n"
    "widget.observe(lambda change: seen.append(change['new']), names='state')\n"
    "widget",
    "# typed in by a test",
]
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
NOT_FOUND = "widget model not found"
"""What JupyterLab itself says of a widget whose kernel has ended."""


def written(path: Path) -> Path:
    """A notebook of the cells, not run."""
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with jupyterlab(tmp_path_factory.mktemp("settings"), folder) as url:
        yield url


def opened(tabs: Tabs, server: str, name: str) -> Any:
    """A notebook in a tab, with a kernel that is connected."""
    tab = tabs.open(f"{server}lab/tree/{name}?reset", color_scheme="light")
    tab.wait_for_function(
        "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.connectionStatus === 'connected'",
        timeout=90_000,
    )
    return tab


def command(tab: Any, name: str, **arguments: Any) -> None:
    """A command of JupyterLab, as its menu has it."""
    tab.evaluate("([name, given]) => jupyterapp.commands.execute(name, given).then(() => null)", [name, arguments])


def run_all(tab: Any) -> Any:
    """Runs all cells; returns the viewer of the widget, drawn."""
    command(tab, "notebook:run-all-cells")
    viewer = tab.locator(".jp-OutputArea-output .ha")
    viewer.locator(".figure canvas").first.wait_for(timeout=90_000)
    return viewer


@pytest.fixture(scope="module")
def ran(tabs: Tabs, server: str, folder: Path) -> Any:
    """A notebook that was run, in its tab."""
    tab = opened(tabs, server, written(folder / "a.ipynb").name)
    run_all(tab)
    return tab


@pytest.fixture
def viewer(ran: Any) -> Any:
    """The viewer in it, clicked, in its first view."""
    found = ran.locator(".jp-OutputArea-output .ha")
    found.locator("h1").click()
    ran.keyboard.press("1")
    found.locator("[data-view=overview]").wait_for()
    return found


def python(tab: Any, code: str) -> str:
    """Runs code in the kernel, beside the cells; returns what it printed."""
    return str(
        tab.evaluate(
            """async (code) => {
              let said = "";
              const future = jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({ code });
              future.onIOPub = ({ content }) => (said += content.text ?? content.evalue ?? "");
              await future.done;
              return said.trim();
            }""",
            code,
        )
    )


NOTEBOOK = """() => {
  const { content } = jupyterapp.shell.currentWidget;
  return [content.activeCellIndex, content.widgets.map((cell) => [cell.model.type, cell.model.sharedModel.source])];
}"""


def output(tab: Any, cell: int) -> Any:
    """What a cell shows."""
    return tab.locator(".jp-Notebook .jp-Cell").nth(cell).locator(".jp-OutputArea-output")


def assert_stills(of: Any) -> None:
    """The table of the trace and the pictures of the call are there; ``of`` returns the output of a cell."""
    trace, call = of(1), of(2)
    assert trace.get_by_text("Trace(2 calls of InductionTransformer)", exact=True).is_visible()
    assert [row.split("\t")[:4] for row in trace.locator("tbody").inner_text().splitlines()] == [
        [str(i), f"blocks.{i}.attn", "main self", "1 4 17 17"] for i in range(2)
    ]
    assert sizes(trace.locator("img")) == [(4 * 17 + 3 * 3, 17)] * 2
    assert call.get_by_text("faithful: output").is_visible() and call.get_by_text("head 3", exact=True).is_visible()
    assert sizes(call.locator("img")) == [(102, 102)] * 4


# ------------------------------------------------------------------------------------------------ with a kernel


def test_a_cell_that_ends_in_a_trace_or_a_call_shows_it(ran: Any) -> None:
    assert_stills(lambda cell: output(ran, cell))


def test_the_widget_is_there_once(ran: Any, viewer: Any) -> None:
    assert viewer.count() == 1 and view(viewer) == "Overview"
    assert ran.evaluate("document.querySelector('.jp-OutputArea-output [class*=hookattn-]').shadowRoot !== null")
    assert "4 induction heads" in viewer.locator(".figure").inner_text()
    ran.wait_for_timeout(4_000)  # by then the page that stands in for it would have come
    assert ran.locator("iframe[title=hookattn]").count() == 0
    assert not ran.get_by_text("The widget is not running here").is_visible()
    assert not ran.locator("[data-still]").is_visible()


def test_the_selection_goes_to_python_and_back(ran: Any, viewer: Any) -> None:
    viewer.get_by_role("tab", name="Matrix").click()
    viewer.locator(".plane canvas").first.wait_for()
    assert python(ran, "print(widget.state['view'], seen[-1]['view'])") == "matrix matrix"
    python(ran, "widget.state = {'view': 'matrix', 'layer': 0, 'heads': [2]}")
    viewer.locator("header", has_text="layer 0").wait_for()
    assert viewer.locator(".chips [aria-pressed=true]").all_inner_texts() == ["2"]
    # What is shown is what the kernel holds, to the last bit that a reader can see.
    viewer.locator(".as-table summary").click()
    viewer.locator(".as-table tbody tr").first.wait_for()
    first = viewer.locator(".as-table tbody tr").first.inner_text().split("\t")
    assert float(first[-1]) == pytest.approx(float(python(ran, "print(float(trace[0].weights[0, 2].max()))")), abs=1e-4)


def test_keys_in_the_viewer_are_not_the_notebooks(ran: Any, viewer: Any) -> None:
    """In command mode d d deletes a cell, x cuts it, a and b add one, m and 1 make it text, y code, Enter edits it."""
    before = ran.evaluate(NOTEBOOK)
    for key in "ddxabmyv0000ijkz1":
        ran.keyboard.press(key)
    for key in ("Shift+D", "Enter", "ArrowDown", "ArrowUp", "Escape"):
        ran.keyboard.press(key)
    ran.keyboard.press("3")
    viewer.locator("[data-view=matrix]").wait_for()
    ran.wait_for_timeout(300)
    assert ran.evaluate(NOTEBOOK) == before
    assert ran.locator(".jp-Dialog").count() == 0  # 0 0 would ask whether to restart the kernel
    assert python(ran, "print(len(trace))") == "2"


def test_keys_in_the_notebook_are_not_the_viewers(ran: Any, viewer: Any) -> None:
    state = python(ran, "print(widget.state)")
    before = ran.evaluate(NOTEBOOK)[1]
    cell = ran.locator(".jp-Notebook .jp-Cell").nth(4)
    cell.locator(".cm-content").click()
    ran.keyboard.press("End")
    ran.keyboard.type("2]fm")
    assert ran.evaluate(NOTEBOOK)[1][4][1] == before[4][1] + "2]fm"
    for _ in "2]fm":
        ran.keyboard.press("Backspace")
    ran.keyboard.press("Escape")
    ran.keyboard.press("b")
    ran.wait_for_function("jupyterapp.shell.currentWidget.content.widgets.length === 6")
    ran.keyboard.press("d")
    ran.keyboard.press("d")
    ran.wait_for_function("jupyterapp.shell.currentWidget.content.widgets.length === 5")
    assert ran.evaluate(NOTEBOOK)[1] == before and python(ran, "print(widget.state)") == state


def test_the_viewer_follows_the_theme(ran: Any, viewer: Any) -> None:
    assert viewer.get_attribute("data-theme") == "light"
    command(ran, "apputils:change-theme", theme="JupyterLab Dark")
    ran.locator('.jp-OutputArea-output .ha[data-theme="dark"]').wait_for()
    command(ran, "apputils:change-theme", theme="JupyterLab Light")
    ran.locator('.jp-OutputArea-output .ha[data-theme="light"]').wait_for()


def test_a_cell_that_is_run_again_shows_one_viewer(ran: Any, viewer: Any) -> None:
    command(ran, "notebook:run-all-cells")
    ran.wait_for_function("jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'")
    viewer.locator(".figure canvas").first.wait_for()
    assert viewer.count() == 1 and view(viewer) == "Overview"


# --------------------------------------------------------------------------------------- saved, and without a kernel


@pytest.fixture(scope="module")
def saved(tabs: Tabs, server: str, folder: Path) -> Path:
    """A notebook that was run and saved, by the key, from within the viewer; its kernel has ended."""
    path = written(folder / "saved.ipynb")
    tab = opened(tabs, server, path.name)
    viewer = run_all(tab)
    viewer.locator("h1").click()
    tab.keyboard.press("Control+s")
    tab.wait_for_function("!jupyterapp.shell.currentWidget.context.model.dirty")
    tab.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    tab.close()
    return path


def test_what_is_saved(saved: Path) -> None:
    cells = nbformat.read(saved, 4).cells
    for cell, said in ((1, "Trace(2 calls"), (2, "Call(0: blocks.0.attn")):
        (one,) = cells[cell].outputs
        assert said in one.data["text/html"] and said in one.data["text/plain"]
        assert "<script" not in one.data["text/html"]
    widget, page = cells[3].outputs
    assert "application/vnd.jupyter.widget-view+json" in widget.data
    assert "data:image/png;base64," in page.data["text/html"] and "x-hookattn-page" in page.data["text/html"]


def reopened(tabs: Tabs, server: str, name: str) -> Any:
    tab = opened(tabs, server, name)
    output(tab, 3).first.wait_for()
    return tab


def test_a_saved_notebook_shows_it_all_without_a_kernel(saved: Path, tabs: Tabs, server: str) -> None:
    """The kernel that starts with it has run nothing: it knows no widget."""
    tab = reopened(tabs, server, saved.name)
    assert_stills(lambda cell: output(tab, cell))
    frame = tab.frame_locator("iframe[title=hookattn]")
    frame.locator("[data-view=overview]").wait_for(timeout=30_000)
    assert "4 induction heads" in frame.locator(".figure").inner_text()
    assert tab.get_by_text("The widget is not running here").is_visible()
    command(tab, "apputils:change-theme", theme="JupyterLab Dark")
    frame.locator('.ha[data-theme="dark"]').wait_for()
    command(tab, "apputils:change-theme", theme="JupyterLab Light")
    before = tab.evaluate(NOTEBOOK)
    frame.locator("h1").click()
    for key in "ddx3":
        tab.keyboard.press(key)
    frame.locator("[data-view=matrix]").wait_for()
    assert tab.evaluate(NOTEBOOK)[1] == before[1]
    tabs.expected(NOT_FOUND)


def test_a_notebook_that_is_not_trusted_shows_the_pictures(saved: Path, tabs: Tabs, server: str, folder: Path) -> None:
    """As one that came by mail: JupyterLab runs no script in it and takes out much of the HTML."""
    found = nbformat.read(saved, 4)
    found.cells.insert(4, nbformat.v4.new_markdown_cell("changed elsewhere"))
    nbformat.write(found, folder / "sent.ipynb")
    tab = reopened(tabs, server, "sent.ipynb")
    assert_stills(lambda cell: output(tab, cell))
    pictures = output(tab, 3).locator("img")
    assert sizes(pictures) == [(77, 17)] * 2 and pictures.first.is_visible()
    assert not tab.evaluate("jupyterapp.shell.currentWidget.content.model.cells.get(3).trusted")
    tab.wait_for_timeout(4_000)
    assert tab.locator("iframe[title=hookattn]").count() == 0
    tabs.expected(NOT_FOUND)


def test_an_export_shows_the_pictures_where_no_script_runs(saved: Path, tabs: Tabs, tmp_path: Path) -> None:
    made = tmp_path / "saved.html"
    command = [sys.executable, "-m", "nbconvert", "--to", "html", str(saved), "--output", str(made)]
    subprocess.run(command, env=environment(tmp_path / "settings"), check=True, capture_output=True, timeout=120)
    tab = tabs.open(made.as_uri(), java_script_enabled=False)

    def of(cell: int) -> Any:
        return tab.locator(".jp-Cell").nth(cell).locator(".jp-OutputArea-output")

    assert_stills(of)
    assert sizes(of(3).locator("img")) == [(77, 17)] * 2
    assert all(one.is_visible() for one in tab.locator("img").all())
