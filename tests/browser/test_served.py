"""The served page in a browser: large files, and files that change under the reader's eyes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn.demo.induction import example_tokens, load_pretrained

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from hookattn.render.options import viewer_options
from hookattn.render.server import open_in_browser
from tests.render.test_server import ten_gigabytes
from tests.serving import Serving

pytestmark = pytest.mark.browser


@pytest.fixture
def path(tmp_path: Path) -> Path:
    ids = example_tokens(0, length=8)
    with torch.no_grad():
        trace = hookattn.trace(load_pretrained(), ids, tokens=[[f"t{i}" for i in ids[0].tolist()]])
    return Path(trace.save(tmp_path / "run.safetensors"))


@pytest.fixture
def open_page(serving: Callable[..., str], open_page: Callable[..., Any]) -> Callable[..., Any]:
    """Its pages are closed before the server is: what they read in the background must not meet a closed door."""
    return open_page


@pytest.fixture
def serving() -> Iterator[Callable[..., str]]:
    """Serves a file, and returns the address."""
    with ExitStack() as stack:
        yield lambda path, **options: stack.enter_context(Serving(path, **options)).url


def visit(tab: Any, url: str) -> Any:
    tab.route(url + "**", lambda route: route.continue_())
    tab.goto(url)
    tab.wait_for_selector(".figure, [role=alert]", timeout=30_000)
    return tab


def test_it_shows_the_file(open_page: Callable[..., Any], serving: Callable[..., str], path: Path) -> None:
    tab = visit(open_page(), serving(path, options=viewer_options(state={"layer": 1}, theme="dark")))
    assert tab.locator("[role=alert]").count() == 0
    for token in hookattn.load(path).tokens[0]:
        tab.locator(".ha", has_text=token).wait_for(timeout=10_000)
    assert tab.title() == "InductionTransformer · run.safetensors"
    assert tab.locator("[data-theme=dark]").count() == 1


def test_ten_gigabytes_show_a_head(open_page: Callable[..., Any], serving: Callable[..., str], path: Path) -> None:
    tab, taken = open_page(), []
    tab.on("response", lambda response: taken.append(int(response.headers.get("content-length", 0))))
    visit(tab, serving(ten_gigabytes(path), options=viewer_options(state={"view": "matrix", "layer": 7, "heads": [3]})))
    tab.wait_for_selector(".figure canvas")
    tab.wait_for_timeout(1_000)
    assert tab.locator("[role=alert]").count() == 0
    assert sum(taken) < 3 * 4 * 4096**2, "more was read than a head or two"


def test_a_file_that_changes_is_said_in_the_page(
    open_page: Callable[..., Any], serving: Callable[..., str], path: Path
) -> None:
    url = serving(path, options=viewer_options(state={"layer": 0}))
    tab = visit(open_page(), url)
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(1, 1))
    tab.evaluate("""location.hash = '{"layer":1}'""")
    tab.get_by_text("The file has changed since it was opened. Start hookattn view again").first.wait_for(
        timeout=10_000
    )
    visit(tab, url)
    assert "Start hookattn view again" in tab.locator("[role=alert]").inner_text()
    tab.wait_for_timeout(500)
    tab.close()
    assert any("412" in problem for problem in tab.problems)
    tab.problems[:] = [problem for problem in tab.problems if "412" not in problem]


@pytest.mark.parametrize("how", ["vanishes", "is replaced"])
def test_a_file_whose_name_is_gone_is_shown_on(
    open_page: Callable[..., Any], serving: Callable[..., str], path: Path, how: str
) -> None:
    tab = visit(open_page(), serving(path, options=viewer_options(state={"layer": 0})))
    if how == "vanishes":
        path.unlink()
    else:
        other = path.with_name("other")
        other.write_bytes(path.read_bytes()[::-1])
        other.replace(path)
    tab.evaluate("""location.hash = '{"layer":1}'""")
    tab.locator(".head, h1, .figure").first.wait_for()
    tab.wait_for_timeout(1_000)
    assert tab.locator("[role=alert]").count() == 0 and tab.locator(".figure").count() == 1
    assert tab.evaluate("JSON.parse(decodeURIComponent(location.hash.slice(1))).layer") == 1


def test_the_file_that_leads_on_does(
    open_page: Callable[..., Any], serving: Callable[..., str], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    url = serving(path)
    tab = open_page()
    tab.route(url + "**", lambda route: route.continue_())
    with ExitStack() as stack:
        open_in_browser(url, stack)
        tab.goto(opened[0])
        tab.wait_for_url(url + "**")
        tab.wait_for_selector(".figure")


def test_a_page_of_another_origin_gets_nothing(
    open_page: Callable[..., Any], serving: Callable[..., str], path: Path
) -> None:
    """Though it knows the whole address: by script, as a picture, as a script of its own, in a frame."""
    url, tab = serving(path), open_page()
    tab.route(url + "**", lambda route: route.continue_())
    text = f"""<!doctype html><iframe src="{url}"></iframe><script>window.got = [];
    const note = (how) => (what) => got.push([how, String(what)]);
    fetch("{url}trace").then((r) => r.text()).then(note("cors"), note("refused"));
    fetch("{url}trace", {{ mode: "no-cors" }}).then((r) => r.text()).then(note("opaque"), note("refused"));
    import("{url}hookattn-viewer.js").then(note("module"), note("refused"));
    const image = new Image(); image.onload = note("image"); image.onerror = () => note("refused")("image");
    image.src = "{url}trace";</script>"""
    tab.route("http://evil.test/", lambda route: route.fulfill(body=text, content_type="text/html"))
    tab.goto("http://evil.test/")
    tab.wait_for_function("got.length === 4")
    got = tab.evaluate("got")
    assert {how for how, _ in got} <= {"refused", "opaque"} and all(not what for how, what in got if how == "opaque")
    assert all(frame.locator(".figure").count() == 0 for frame in tab.frames)
    tab.wait_for_timeout(500)
    tab.close()
    tab.problems.clear()  # each refusal is one


def test_two_files_open_together(open_page: Callable[..., Any], serving: Callable[..., str], path: Path) -> None:
    tab = visit(open_page(), serving(path, compare=str(path)))
    assert tab.locator("[role=alert]").count() == 0
