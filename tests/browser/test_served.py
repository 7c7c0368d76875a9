"""The served page in a browser: large files, and files that change under the reader's eyes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn.demo.induction import example_tokens, load_pretrained

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import uvicorn

from hookattn.render.options import viewer_options
from hookattn.render.server import HOST, application, listen
from tests.render.test_server import ten_gigabytes

pytestmark = pytest.mark.browser


@pytest.fixture
def path(tmp_path: Path) -> Path:
    ids = example_tokens(0, length=8)
    with torch.no_grad():
        trace = hookattn.trace(load_pretrained(), ids, tokens=[[f"t{i}" for i in ids[0].tolist()]])
    return Path(trace.save(tmp_path / "run.safetensors"))


@pytest.fixture
def serving() -> Iterator[Callable[..., str]]:
    """Serves a file, and returns the address."""
    running = []

    def start(path: Path, **options: Any) -> str:
        listening = listen(0)
        server = uvicorn.Server(
            uvicorn.Config(
                application(str(path), **options), log_level="warning", lifespan="off", timeout_graceful_shutdown=1
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        running.append((server, thread))
        return f"http://{HOST}:{listening.getsockname()[1]}/"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(20)


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


@pytest.mark.parametrize("what", ["changes", "vanishes"])
def test_a_file_that_changes_is_said_in_the_page(
    open_page: Callable[..., Any], serving: Callable[..., str], path: Path, what: str
) -> None:
    tab = visit(open_page(), serving(path, options=viewer_options(state={"layer": 0})))
    if what == "changes":
        path.write_bytes(path.read_bytes()[::-1])
        os.utime(path, ns=(1, 1))
    else:
        path.unlink()
    tab.evaluate("""location.hash = '{"layer":1}'""")
    said = "The file has changed" if what == "changes" else "The file is not there any more"
    tab.get_by_text(said).first.wait_for(timeout=10_000)
    status = "412" if what == "changes" else "410"
    tab.wait_for_timeout(500)
    tab.close()
    assert any(status in problem for problem in tab.problems)
    tab.problems[:] = [problem for problem in tab.problems if status not in problem]


def test_two_files_open_together(open_page: Callable[..., Any], serving: Callable[..., str], path: Path) -> None:
    tab = visit(open_page(), serving(path, compare=str(path)))
    assert tab.locator("[role=alert]").count() == 0
