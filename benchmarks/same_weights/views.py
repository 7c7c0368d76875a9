"""What viewers make of one trace: how large a page is, how long it takes, and what it draws without a network."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

import hookattn

from .cases import WORDS

LAYERS, HEADS = 12, 12
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"


@dataclass(frozen=True)
class Seen:
    """One page, made and opened.

    Attributes:
        seconds: to make it.
        megabytes: of the file.
        hosts: that it asks for something.
        drawn: pictures (canvas and svg) on it, with nobody answering.
    """

    seconds: float
    megabytes: float
    hosts: tuple[str, ...]
    drawn: int


def traced(tokens: int) -> hookattn.Trace:
    """A GPT-2 of 12 layers and 12 heads with drawn weights, which reads ``tokens`` tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config: Any = GPT2Config(n_layer=LAYERS, n_head=HEADS, n_embd=192, initializer_range=0.1, **WORDS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel(config).eval()
    ids = torch.randint(1, 60, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        trace = hookattn.trace(model, ids, tokens=[f"t{i}" for i in ids[0].tolist()])
    assert all(call.certificate.faithful for call in trace)
    return trace


def _page(trace: hookattn.Trace) -> str:
    from hookattn import render

    return render.page(trace)


def _head_view(trace: hookattn.Trace) -> str:
    from hookattn.interop import bertviz

    return str(bertviz.head_view(trace, html_action="return").data)


def _model_view(trace: hookattn.Trace) -> str:
    from hookattn.interop import bertviz

    return str(bertviz.model_view(trace, html_action="return").data)


def _attention_heads(trace: hookattn.Trace) -> str:
    from hookattn.interop import circuitsvis

    return str(circuitsvis.attention_heads(trace))


VIEWS: dict[str, Callable[[hookattn.Trace], str]] = {
    "hookattn `render.page`": _page,
    "BertViz `head_view`": _head_view,
    "BertViz `model_view`": _model_view,
    "CircuitsVis `attention_heads`": _attention_heads,
}


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser that reaches nothing."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def seen(view: str, trace: hookattn.Trace, browser: Any, picture: Path | None = None) -> Seen:
    """Make a page, and open it where nobody answers.

    Args:
        view: a key of ``VIEWS``.
        trace: what is shown.
        browser: of ``chromium()``.
        picture: where a screenshot goes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begun = time.perf_counter()
        html = VIEWS[view](trace)
        seconds = time.perf_counter() - begun
    hosts: set[str] = set()

    def refuse(route: Any) -> None:
        hosts.add(urlparse(route.request.url).netloc)
        route.abort()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        whole = html if "<html" in html[:500].lower() else f'<!doctype html><meta charset="utf-8"><body>{html}</body>'
        path.write_text(whole, encoding="utf-8")
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.route(re.compile("^(?!data:|blob:|file:)"), refuse)
        page.goto(path.as_uri())
        page.wait_for_timeout(3000)
        drawn = page.locator("canvas, svg").count()
        if picture is not None:
            page.screenshot(path=picture)
        page.close()
        return Seen(seconds, path.stat().st_size / 1e6, tuple(sorted(hosts)), drawn)
