"""JupyterLab and marimo as a reader has them: a server, a real kernel, Chromium, and nothing beyond this machine.

`make test-notebook` runs these, in an environment of its own. The browser is that of tests/browser.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.browser.conftest import browser as browser

WITHOUT_HOST = ("data", "blob", "file", "about")
"""Schemes of addresses at which no server is asked."""


class Tabs:
    """Opens tabs in fresh contexts, and knows what went wrong in them.

    Attributes:
        problems: errors of consoles and scripts, and whatever was asked for beyond this machine, which is refused.
    """

    def __init__(self, browser: Any) -> None:
        self.problems: list[str] = []
        self._browser = browser
        self._contexts: list[Any] = []

    def open(self, url: str, **options: Any) -> Any:
        """A tab at an address; ``options`` are those of a context of playwright."""
        context = self._browser.new_context(**{"viewport": {"width": 1280, "height": 1500}, **options})
        self._contexts.append(context)
        context.route("**/*", self._guard)
        tab = context.new_page()
        tab.on("pageerror", lambda error: self.problems.append(str(error)))
        tab.on("console", lambda said: self.problems.append(said.text) if said.type == "error" else None)
        tab.goto(url)
        return tab

    def expected(self, *words: str) -> None:
        """Forgets the problems that have one of these words."""
        self.problems[:] = [one for one in self.problems if not any(word in one for word in words)]

    def close(self) -> None:
        """Closes all of them."""
        for context in self._contexts:
            context.close()

    def _guard(self, route: Any) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in WITHOUT_HOST or address.hostname in ("127.0.0.1", "localhost"):
            route.continue_()
        else:
            self.problems.append(f"asked for {route.request.url}")
            route.abort()


@pytest.fixture(scope="module")
def tabs(browser: Any) -> Iterator[Tabs]:
    """Those of a module, closed at its end."""
    made = Tabs(browser)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def nothing_went_wrong(tabs: Tabs) -> Iterator[None]:
    """After each test: a problem that it did not expect is a failure."""
    yield
    found, tabs.problems[:] = list(tabs.problems), []
    assert not found
