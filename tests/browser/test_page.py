"""The self-contained page in a browser: from disk, offline, whatever the tokens are."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.render import page_size
from hookattn.render.html_page import page, save_page
from tests.render.test_html_page import HOSTILE, made, small

pytestmark = pytest.mark.browser


def opened(tab: Any, path: Path, link: str = "") -> Any:
    """The page from disk, once a view is drawn."""
    tab.goto(path.as_uri() + link)
    tab.wait_for_selector(".figure", timeout=30_000)
    return tab


@pytest.fixture(scope="module")
def trace() -> hookattn.Trace:
    ids = example_tokens(0, length=8)
    with torch.no_grad():
        return hookattn.trace(load_pretrained(), ids, tokens=[[f"t{i}" for i in ids[0].tolist()]])


def test_it_opens_from_disk_and_fetches_nothing(open_page: Callable[..., Any], trace: Any, tmp_path: Path) -> None:
    tab, requests = open_page(), []
    tab.on("request", lambda request: requests.append(request.url.partition(":")[0]))
    opened(tab, Path(save_page(trace, tmp_path / "a.html")))
    assert {"file"} <= set(requests) <= {"file", "data", "blob"}
    assert requests.count("file") == 1
    assert tab.title() == "InductionTransformer · trace"
    for token in trace.tokens[0]:
        tab.locator(".ha", has_text=token).wait_for(timeout=10_000)


def test_tokens_are_text(open_page: Callable[..., Any], tmp_path: Path) -> None:
    tab = open_page()
    tab.on("dialog", lambda dialog: pytest.fail(f"a token ran: {dialog.message}"))
    opened(tab, Path(save_page(made(HOSTILE), tmp_path / "a.html", title=HOSTILE[0])))
    assert tab.title() == HOSTILE[0]
    tab.locator(".ha", has_text="onerror=alert(1)").wait_for(timeout=10_000)
    assert tab.locator("img").count() == 0


def test_a_field_without_room_says_so(
    open_page: Callable[..., Any], trace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_size, "ROOM", 1)
    tab = opened(open_page(), Path(save_page(trace, tmp_path / "a.html", state={"view": "neuron"})), "")
    tab.locator(".ha", has_text="had no room in this page").first.wait_for(timeout=10_000)
    monkeypatch.undo()
    lean = hookattn.trace(load_pretrained(), example_tokens(0, length=8), capture=("weights", "mask"))
    tab = opened(open_page(), Path(save_page(lean, tmp_path / "b.html", state={"view": "neuron"})), "")
    tab.locator(".ha", has_text='Trace again with capture=("q", …)').first.wait_for(timeout=10_000)


def test_a_link_restores_the_selection(open_page: Callable[..., Any], trace: Any, tmp_path: Path) -> None:
    path = Path(save_page(trace, tmp_path / "a.html", state={"layer": 0}))
    tab = opened(open_page(), path, '#{"layer":1,"heads":[2]}')
    link = tab.evaluate("decodeURIComponent(location.hash)")
    assert '"layer":1' in link and '"heads":[2]' in link
    first = opened(open_page(), path)
    first.wait_for_timeout(100)
    assert '"layer":1' not in first.evaluate("decodeURIComponent(location.hash)")


def test_512_tokens_are_there_soon(open_page: Callable[..., Any], tmp_path: Path) -> None:
    """12 layers of 12 heads; two seconds where nothing else runs, five on a busy machine."""
    path = Path(save_page(made(512, model=small()), tmp_path / "a.html"))
    assert path.stat().st_size <= 80_000_000
    tab = opened(open_page(), path)
    assert tab.evaluate("performance.now()") < 5_000


def test_it_shows_in_a_frame_of_another_page(open_page: Callable[..., Any], trace: Any, tmp_path: Path) -> None:
    """A notebook shows it so, in a frame without an address."""
    outer = tmp_path / "outer.html"
    outer.write_text(f'<iframe srcdoc="{html.escape(page(trace))}" width="900" height="700"></iframe>', "utf-8")
    tab = open_page()
    tab.goto(outer.as_uri())
    frame = tab.frame_locator("iframe")
    frame.locator(".figure").wait_for(timeout=30_000)
    frame.locator(".ha", has_text=trace.tokens[0][1]).wait_for(timeout=10_000)


def test_a_damaged_page_says_so(open_page: Callable[..., Any], trace: Any, tmp_path: Path) -> None:
    text = page(trace)
    start = text.rindex('<script type="application/x-hookattn"')
    path = tmp_path / "a.html"
    path.write_text(text[:start] + text[text.index("</script>", start) + len("</script>") :], "utf-8")
    tab = open_page()
    tab.goto(path.as_uri())
    tab.get_by_role("alert").first.wait_for(timeout=30_000)
    assert "cut short" in tab.inner_text("[role=alert]")


def test_without_data_it_says_so(open_page: Callable[..., Any], trace: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_text(page(trace).replace('type="application/x-hookattn"', 'type="other"'), "utf-8")
    tab = open_page()
    tab.goto(path.as_uri())
    tab.wait_for_selector("#viewer [role=alert]")
    assert "There is no trace in this page" in tab.inner_text("#viewer")


def test_two_traces_open_together(open_page: Callable[..., Any], trace: Any, tmp_path: Path) -> None:
    ids = example_tokens(1, length=8)
    with torch.no_grad():
        second = hookattn.trace(load_pretrained(), ids, tokens=[[f"u{i}" for i in ids[0].tolist()]])
    tab = opened(open_page(), Path(save_page(trace, tmp_path / "a.html", compare=second)))
    assert tab.get_by_role("alert").count() == 0
