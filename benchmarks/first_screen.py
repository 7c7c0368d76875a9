"""How soon the viewer shows a trace and has measured its heads, in Chromium: medians, in milliseconds from the start of
the navigation.

In a shell:

    python -m benchmarks.first_screen                               # all cases
    python -m benchmarks.first_screen --cases 512 --rounds 5 --json out/first_screen.json

It needs playwright and a Chromium (``--chromium``); the browser reaches this machine alone. *painted* is the first
paint of the page, *drawn* when the view in front stands, *found* when all heads are measured; *longest* is the longest
task of the page's own thread. On a busy machine look at *busy*, the time on a processor of all the browser's processes
until then.
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
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import hookattn
from hookattn.render.html_page import save_page

_WATCH = """
const seen = globalThis.seen = { drawn: null, found: null, longest: 0 };
new PerformanceObserver((list) => {
  for (const task of list.getEntries()) seen.longest = Math.max(seen.longest, task.duration);
}).observe({ entryTypes: ["longtask"] });
const watch = setInterval(() => {
  const viewer = globalThis.viewer;
  if (viewer?.state == null) return;
  if (seen.drawn === null) {
    seen.drawn = 0;
    requestAnimationFrame(() => requestAnimationFrame(() => (seen.drawn = performance.now())));
  }
  const { done, total } = viewer.findings;
  if (total > 0 && done >= total) {
    seen.found = performance.now();
    clearInterval(watch);
  }
}, 5);
"""


class _Layers(nn.Module):
    """Causal attention of twelve heads of 64, far from uniform."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(768, 3 * 768) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = layer(x).view(*x.shape[:2], 3, 12, 64).permute(2, 0, 3, 1, 4)
            x = x + nn.functional.scaled_dot_product_attention(4 * q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x


def _traced(layers: int, tokens: int, **options: Any) -> hookattn.Trace:
    with torch.no_grad():
        words = [f"w{i % 97}" for i in range(tokens)]
        return hookattn.trace(_Layers(layers), torch.randn(1, tokens, 768), tokens=[words], **options)


@contextmanager
def _page(folder: Path, layers: int, tokens: int) -> Iterator[tuple[str, int]]:
    path = Path(save_page(_traced(layers, tokens), folder / "page.html"))
    yield path.as_uri(), path.stat().st_size
    path.unlink()


@contextmanager
def _served(folder: Path, layers: int, tokens: int, stored: bool) -> Iterator[tuple[str, int]]:
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
            yield json.loads(text)["url"], path.stat().st_size
        finally:
            process.terminate()
    path.unlink()


_CASES: dict[str, Callable[[Path], Any]] = {
    "page of 12 × 12 × 128": partial(_page, layers=12, tokens=128),
    "page of 12 × 12 × 512": partial(_page, layers=12, tokens=512),
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
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, case in _CASES.items():
            if options.cases not in name:
                continue
            with case(Path(folder)) as (url, size):
                rows = [_once(browser, url) for _ in range(options.rounds)]
            found[name] = {"MB": size / 1e6, **{key: median(row[key] for row in rows) for key in rows[0]}}
            print(name + ":", ", ".join(f"{key} {value:,.1f}" for key, value in found[name].items()), flush=True)
        browser.close()
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")


def _once(browser: Any, url: str) -> dict[str, float]:
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.add_init_script(_WATCH)
    before = _busy()
    page.goto(url)
    # The page's policy forbids what wait_for_function does.
    end = time.monotonic() + 120
    while not page.evaluate("seen.drawn && seen.found"):
        if time.monotonic() > end:
            raise SystemExit(f"{url.partition('?')[0]}: its heads were not measured in two minutes")
        time.sleep(0.1)
    busy = 1000 * (_busy() - before)
    missing = page.evaluate("viewer.findings.missing")
    if missing is not None:
        raise SystemExit(f"nothing was measured: {missing}")
    seen = page.evaluate("seen")
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    context.close()
    return {"painted": painted, **seen, "busy": busy}


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
