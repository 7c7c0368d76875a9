"""Chromium for the tests of the viewer: no network, a fresh profile, and a site that answers from the test itself."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hookattn

VIEWER = Path(__file__).parents[2] / "hookattn" / "render" / "viewer"
ORIGIN = "http://viewer.test"
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium; skipped where it or playwright is missing."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if not Path(CHROMIUM).exists():
        pytest.skip("no chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages that reach nothing: a request that the test does not answer is a failure, and so is an error."""
    contexts: list[Any] = []
    problems: list[str] = []

    def refuse(route: Any) -> None:
        problems.append(route.request.url)
        route.abort()

    def open_(**options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.route(re.compile("^(?!data:|blob:|file:)"), refuse)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.problems = problems
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not problems


def serve(page: Any, files: dict[str, Path | str]) -> None:
    """Answers ``ORIGIN/name`` for every file, also in ranges."""

    def path(url: str) -> str:
        return url.split("?")[0].removeprefix(ORIGIN + "/")

    def answer(route: Any) -> None:
        name = path(route.request.url)
        content = files[name]
        data = content.read_bytes() if isinstance(content, Path) else content.encode()
        kinds = {".js": "text/javascript", ".html": "text/html; charset=utf-8"}
        kind = kinds.get(Path(name).suffix, "application/octet-stream")
        headers = {"Content-Type": kind, "ETag": f'"{hash(data)}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", route.request.headers.get("range", ""))
        if asked:
            start, end = int(asked[1]), int(asked[2]) + 1
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            route.fulfill(status=206, headers=headers, body=data[start:end])
        else:
            route.fulfill(status=200, headers=headers, body=data)

    page.route(lambda url: url.startswith(ORIGIN) and path(url) in files, answer)


PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>trace</title>
<body style="margin:0"><div id="viewer"></div><script type="module">
import {{ mount, served }} from "/hookattn-viewer.js";
const options = {options};
if ({view}) options.state = {{ view: {view}, ...options.state }};
window.viewer = mount(document.getElementById("viewer"), await served("/trace.safetensors"), options);
await viewer.ready; window.opened = performance.now();
</script>"""


def show(page: Any, trace: Path, options: str = "{link: true}", fragment: str = "", view: str | None = "head") -> Any:
    """Mounts the viewer on a trace file; ``options`` is JavaScript. Waits until it is open.

    ``view`` is the one that opens unless the options or the link name another; None: the viewer's own choice.
    """
    page_ = PAGE.format(options=options, view=json.dumps(view))
    files = {"index.html": page_, "hookattn-viewer.js": VIEWER / "hookattn-viewer.js"}
    serve(page, {**files, "trace.safetensors": trace})
    page.goto(f"{ORIGIN}/index.html{fragment}")
    page.wait_for_function("window.opened !== undefined")
    return page


# Whether a cell of a canvas is hatched: a cell with a number has one colour all over.
HATCHED = """([selector, t, s, rows, cols]) => {
  const c = document.querySelector('#viewer').shadowRoot.querySelector(selector);
  const [w, h] = [c.width / cols, c.height / rows];
  const box = [Math.ceil(s * w) + 1, Math.ceil(t * h) + 1, Math.floor(w) - 2, Math.floor(h) - 2];
  const all = new Uint32Array(c.getContext('2d').getImageData(...box).data.buffer);
  return new Set(all).size > 1;
}"""


def assert_fits(page: Any) -> None:
    """Neither the page nor its figure is wider than the window."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    figure = page.locator(".figure").evaluate("f => [f.scrollWidth, f.clientWidth]")
    assert figure[0] <= figure[1]


# ------------------------------------------------------------------------------------------- what is looked at

TOKENS = ["<s>", "Ġthe", "Ġcat", "ing", "çĮ", "«", "Ċ", "Ġ×©×ľ×ķ×Ŀ", "</script><img src=x onerror=alert(1)>"]
READ = ["<s>", "the", "cat", "…ing", "猫 1/2", "猫 2/2", "↵", "שלום", "</script><img src=x onerr…"]


class Layers(torch.nn.Module):
    """Layers of attention of the given numbers of heads, over one sequence, or from the first to the second."""

    def __init__(self, *heads: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = torch.nn.ModuleList(torch.nn.MultiheadAttention(24, h, batch_first=True) for h in heads)

    def forward(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            other = x if y is None else y
            x = x + layer(3 * x, 3 * other, other, attn_mask=mask, need_weights=False)[0]
        return x


def causal(n: int) -> Tensor:
    """The mask of ``MultiheadAttention`` that hides later keys."""
    return torch.ones(n, n, dtype=torch.bool).triu(1)


@pytest.fixture(scope="session")
def trace() -> hookattn.Trace:
    """Two layers of four causal heads, two sequences of nine tokens of a byte-level vocabulary."""
    model, x = Layers(4, 4).eval(), torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1))
    return hookattn.trace(model, (x, None, causal(9)), tokens=TOKENS)


@pytest.fixture
def file(trace: hookattn.Trace, tmp_path: Path) -> Path:
    """It, in a file."""
    return Path(trace.save(tmp_path / "t.safetensors"))


def state(page: Any) -> dict[str, Any]:
    """The selection."""
    return dict(page.evaluate("viewer.state"))


def cells(page: Any) -> list[list[str]]:
    """The rows of the table of the selection."""
    page.locator(".as-table").wait_for()
    if page.locator(".as-table").get_attribute("open") is None:
        page.locator(".as-table summary").click()
    rows = page.locator(".as-table tbody tr").evaluate_all(
        "rows => rows.map(r => [...r.cells].map(c => c.textContent))"
    )
    return [list(row) for row in rows]


def rows_of_table(page: Any) -> list[tuple[str, str, float]]:
    """Query, key and number of each of them."""
    return [(q, k, float(w.replace("−", "-"))) for q, k, w in cells(page)]
