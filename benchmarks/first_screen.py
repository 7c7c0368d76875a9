"""How soon the viewer shows a trace, in Chromium, and how large its pages are: a table of the bars it is held to, in
milliseconds from the start of the navigation, the least of some rounds.

In a shell:

    python -m benchmarks.first_screen                               # all cases
    python -m benchmarks.first_screen --cases 512 --rounds 5 --json out/first_screen.json

It needs playwright and a Chromium (``--chromium``); the browser reaches this machine alone. *painted* is the first
paint of the page, *drawn* when the view in front stands, *found* when all heads are measured, *complete* when the
overview has settled on a head and shows all of its matrix, or when the flow is drawn; *hover* is from a pointer over a
token to the frame that shows what it looks at; *longest* is the longest task of the page's own thread. On a busy
machine look at *busy*, the time on a processor of all the browser's processes until then.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hookattn
from hookattn.render.html_page import save_page

_WATCH = """
const seen = globalThis.seen = { drawn: null, found: null, complete: null, longest: 0 };
new PerformanceObserver((list) => {
  for (const task of list.getEntries()) seen.longest = Math.max(seen.longest, task.duration);
}).observe({ entryTypes: ["longtask"] });
const within = (selector) => document.getElementById("viewer")?.shadowRoot?.querySelector(selector) ?? null;
function complete({ state, findings }) {
  if (state.view === "flow") return within(".as-table") !== null;
  const [place, led] = [findings.striking, findings.heads[findings.striking?.call]];
  if (seen.found === null || led === undefined) return false;
  return state.nth === place.call && String(state.heads) === String(place.head) &&
    within(".chosen[aria-busy=false] canvas") !== null;
}
const watch = setInterval(() => {
  const viewer = globalThis.viewer;
  if (viewer?.state == null) return;
  if (seen.drawn === null) {
    seen.drawn = 0;
    requestAnimationFrame(() => requestAnimationFrame(() => (seen.drawn = performance.now())));
  }
  const { done, total } = viewer.findings;
  if (seen.found === null && total > 0 && done >= total) seen.found = performance.now();
  if (seen.complete === null && complete(viewer)) seen.complete = performance.now();
  if (seen.found !== null && seen.complete !== null) clearInterval(watch);
}, 5);
"""

_HOVER = """async () => {
  const tokens = [...document.getElementById("viewer").shadowRoot.querySelectorAll(".tok")].slice(0, 12);
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  let least = Infinity;
  for (const token of tokens) {
    await frame();
    const { x, y, width, height } = token.getBoundingClientRect();
    const at = { bubbles: true, composed: true, clientX: x + width / 2, clientY: y + height / 2 };
    const before = performance.now();
    token.dispatchEvent(new PointerEvent("pointermove", at));
    await frame();
    least = Math.min(least, performance.now() - before);
  }
  return least;
}"""

_BARS = {
    "page of 12 × 12 × 128": {"MB": 3},
    "page of 12 × 12 × 128, all see all": {"MB": 3},
    "flow of 12 × 12 × 512, q and k": {"complete": 2000},
    "view of 3 × 12 × 4,096, q and k": {"painted": 1000, "complete": 3000},
    "view of 1 × 12 × 4,096, weights": {"painted": 1000, "complete": 3000},
}
"""What no column of a case is to be above."""


class _Layers(nn.Module):
    """Attention of twelve heads of 64, far from uniform; causal, or all tokens see all."""

    def __init__(self, layers: int, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(768, 3 * 768) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = layer(x).view(*x.shape[:2], 3, 12, 64).permute(2, 0, 3, 1, 4)
            made = nn.functional.scaled_dot_product_attention(4 * q, k, v, is_causal=self.causal)
            x = x + made.transpose(1, 2).flatten(2)
        return x


def _traced(layers: int, tokens: int, causal: bool = True, **options: Any) -> hookattn.Trace:
    with torch.no_grad():
        words = [f"w{i % 97}" for i in range(tokens)]
        return hookattn.trace(_Layers(layers, causal), torch.randn(1, tokens, 768), tokens=[words], **options)


@contextmanager
def _page(folder: Path, layers: int, tokens: int, causal: bool = True) -> Iterator[tuple[str, int]]:
    path = Path(save_page(_traced(layers, tokens, causal), folder / "page.html"))
    yield path.as_uri(), path.stat().st_size
    path.unlink()


@contextmanager
def _served(folder: Path, layers: int, tokens: int, stored: bool, view: str = "") -> Iterator[tuple[str, int]]:
    capture = ("mask", "weights") if stored else ("q", "k", "bias", "mask", "sinks")
    trace = _traced(layers, tokens, capture=capture, to=folder / "run.safetensors", dtype=torch.float16)
    del trace
    path = folder / "run.safetensors"
    command = [
        sys.executable,
        "-c",
        "from hookattn.cli import main; main()",
        "view",
        str(path),
        "--json",
        "--no-open",
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            text = ""
            while not text.rstrip().endswith("}"):
                line = process.stdout.readline()
                if not line:
                    raise SystemExit("hookattn view ended before it had an address")
                text += line
            chosen = f"#{json.dumps({'view': view})}" if view else ""
            yield json.loads(text)["url"] + chosen, path.stat().st_size
        finally:
            process.terminate()
    path.unlink()


_CASES: dict[str, Callable[[Path], Any]] = {
    "page of 12 × 12 × 128": partial(_page, layers=12, tokens=128),
    "page of 12 × 12 × 128, all see all": partial(_page, layers=12, tokens=128, causal=False),
    "page of 12 × 12 × 512": partial(_page, layers=12, tokens=512),
    "flow of 12 × 12 × 512, q and k": partial(_served, layers=12, tokens=512, stored=False, view="flow"),
    "flow of 12 × 12 × 512, weights": partial(_served, layers=12, tokens=512, stored=True, view="flow"),
    "view of 3 × 12 × 4,096, q and k": partial(_served, layers=3, tokens=4096, stored=False),
    "view of 1 × 12 × 4,096, weights": partial(_served, layers=1, tokens=4096, stored=True),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", default="", help="only those whose name has this in it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chromium", default=shutil.which("chromium") or "/usr/bin/chromium")
    parser.add_argument("--json", help="write the numbers to this file")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    found: dict[str, Any] = {}
    print(f"{'':36}" + "".join(f"{column:>10}" for column in _COLUMNS))
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, case in _CASES.items():
            if options.cases not in name:
                continue
            with case(Path(folder)) as (url, size):
                rows = [_once(browser, url) for _ in range(options.rounds)]
            found[name] = {"MB": size / 1e6, **{key: min(row[key] for row in rows) for key in rows[0]}}
            print(_line(name, found[name]), flush=True)
        browser.close()
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")


_COLUMNS = ("MB", "painted", "drawn", "found", "complete", "hover", "longest", "busy")


def _line(name: str, row: dict[str, float]) -> str:
    """A row of the table; what is above its bar has an exclamation mark."""
    bars = _BARS.get(name, {})
    cells = (
        (f"{row[c]:,.2f}" if c == "MB" else f"{row[c]:,.0f}") + ("!" if row[c] > bars.get(c, float("inf")) else " ")
        for c in _COLUMNS
    )
    return f"{name:36}" + "".join(f"{cell:>10}" for cell in cells)


def _once(browser: Any, url: str) -> dict[str, float]:
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.add_init_script(_WATCH)
    before = _busy()
    page.goto(url)
    # The page's policy forbids what wait_for_function does.
    end = time.monotonic() + 120
    while not page.evaluate("seen.drawn && seen.found && seen.complete"):
        if time.monotonic() > end:
            raise SystemExit(f"{url.partition('?')[0]}: it was not complete in two minutes")
        time.sleep(0.1)
    busy = 1000 * (_busy() - before)
    missing = page.evaluate("viewer.findings.missing")
    if missing is not None:
        raise SystemExit(f"nothing was measured: {missing}")
    seen = page.evaluate("seen")
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    hover = page.evaluate(_HOVER) if page.evaluate("viewer.state.view") == "overview" else float("nan")
    context.close()
    return {"painted": painted, **seen, "hover": hover, "busy": busy}


def _busy() -> float:
    """Seconds on a processor of what this process has started and what that has, the server left out."""
    try:
        import psutil
    except ImportError:
        return float("nan")
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            if "python" not in process.name():
                total += sum(process.cpu_times()[:2])
        except psutil.Error:
            continue
    return total


if __name__ == "__main__":
    main()
