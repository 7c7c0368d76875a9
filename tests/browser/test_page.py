"""The self-contained page in a browser: from disk, offline, whatever the tokens are."""

from __future__ import annotations

import base64
import gzip
import html
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.render import page_size
from hookattn.render.html_page import page, save_page
from tests.browser.conftest import show
from tests.render.test_html_page import HOSTILE, contents, decoded, made, small

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


def test_codes_of_queries_and_keys_are_read_as_they_were_written(
    open_page: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page's own reader makes of its blocks, against what docs/viewer.md says of the codes."""
    for sinks in (False, True):
        trace = made(90, model=small(layers=2, heads=3, causal=True))
        if sinks:
            learned = [replace(c, fields={**c.fields, "sinks": torch.tensor([0.0, 1.0, 2.0])}) for c in trace]
            trace = replace(trace, calls=learned)
        weights = 2 * 3 * 90 * 90
        monkeypatch.setattr(page_size, "ROOM", weights + 2 * 90 * 90 // 8 + 20_000)
        text = page(trace)
        document, tensors = contents(text)
        packed = re.findall('data-codec="gzip"[^>]*>([^<]+)<', text)
        raw = tmp_path / f"{sinks}.safetensors"
        raw.write_bytes(b"".join(gzip.decompress(base64.b64decode(part)) for part in packed))
        tab = show(open_page(), raw)
        for place, call in enumerate(trace):
            expected = decoded(document, tensors, place)
            for head in range(3):
                for name in ("q", "k", "scores", "weights"):
                    got = tab.evaluate(
                        """async ([place, name, head]) => {
                          const { Trace, served } = await import("/hookattn-viewer.js");
                          const trace = await Trace.open(await served("/trace.safetensors"));
                          const call = trace.calls[place];
                          const whole = await trace.head(call, name, 0, head);
                          const part = await trace.rows(call, name, 0, head, [11, 23]);
                          return [[...whole.data], [...part.data]];
                        }""",
                        [place, name, head],
                    )
                    whole, width = expected[name][0, head], expected[name].shape[-1]
                    if name == "weights":
                        whole = whole.float()  # as the viewer keeps them
                    near = {"atol": 1e-12, "rtol": 1e-12} if name != "weights" else {"atol": 1e-7, "rtol": 1e-6}
                    assert torch.allclose(torch.tensor(got[0], dtype=whole.dtype).view(-1, width), whole, **near)
                    assert torch.allclose(torch.tensor(got[1], dtype=whole.dtype).view(-1, width), whole[11:23], **near)
            off = (expected["weights"] - call.weights).abs().max()
            assert float(off) < 1 / 255


def test_a_page_with_codes_of_queries_and_keys_says_what_is_rounded(
    open_page: Callable[..., Any], tmp_path: Path
) -> None:
    made_of = made(128, model=small(layers=12))
    tab = opened(open_page(), Path(save_page(made_of, tmp_path / "a.html", state={"view": "neuron"})))
    tab.locator(".notice", has_text="q by at most").wait_for()
    tab.get_by_text("Scores follow from these q and k: off by").first.wait_for(state="attached")
