"""Whether the viewer is dark: what the page around it says, in the words of each host, before what the system says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import ORIGIN, show

pytestmark = pytest.mark.browser

# What hosts write on the body or the root of their page, light first.
SAID = {
    "JupyterLab": ("body", "data-jp-theme-light", "true", "false"),
    "VS Code": ("body", "class", "vscode-light", "vscode-dark"),
    "VS Code, high contrast": ("body", "data-vscode-theme-kind", "vscode-high-contrast-light", "vscode-high-contrast"),
    "marimo": ("body", "data-theme", "light", "dark"),
    "Sphinx": ("html", "data-theme", "light", "dark"),
    "Colab": ("html", "theme", "light", "dark"),
    "Tailwind": ("html", "class", "light other", "other dark"),
    "a scheme": ("body", "style", "color-scheme: light", "color-scheme: dark"),
}
SET = "([of, name, value]) => document.querySelector(of).setAttribute(name, value)"


def theme(page: Any) -> str:
    return str(page.locator(".ha").get_attribute("data-theme"))


def becomes(page: Any, expected: str) -> None:
    page.locator(f'.ha[data-theme="{expected}"]').wait_for(timeout=5_000)


@pytest.mark.parametrize("host", SAID)
def test_the_page_around_it_says_the_theme(open_page: Callable[..., Any], file: Path, host: str) -> None:
    of, name, light, dark = SAID[host]
    page = show(open_page(color_scheme="light"), file, "{}")
    assert theme(page) == "light"
    for value, expected in ((dark, "dark"), (light, "light"), (dark, "dark")):
        page.evaluate(SET, [of, name, value])
        becomes(page, expected)
    page.emulate_media(color_scheme="dark")
    page.evaluate(SET, [of, name, light])
    becomes(page, "light")
    page.emulate_media(media="print")
    page.evaluate(SET, [of, name, dark])
    page.wait_for_timeout(100)
    assert theme(page) == "light"  # paper is white


def test_a_page_that_says_nothing_is_as_the_system_is(open_page: Callable[..., Any], file: Path) -> None:
    page = show(open_page(color_scheme="dark"), file, "{}")
    assert theme(page) == "dark"
    for of, name, value in (("html", "data-theme", "auto"), ("body", "class", "darkroom vscode"),
                            ("body", "style", "color-scheme: light dark")):  # fmt: skip
        page.evaluate(SET, [of, name, value])
    page.emulate_media(color_scheme="light")
    becomes(page, "light")


def test_a_theme_that_was_asked_for_stays(open_page: Callable[..., Any], file: Path) -> None:
    page = show(open_page(color_scheme="light"), file, '{theme: "light"}')
    page.evaluate(SET, ["body", "data-jp-theme-light", "false"])
    page.wait_for_timeout(100)
    assert theme(page) == "light"


def test_a_frame_follows_the_page_that_it_is_in(open_page: Callable[..., Any], file: Path) -> None:
    """As the page that a saved notebook carries: it has nothing to go by but the notebook around it."""
    page = show(open_page(color_scheme="light"), file, "{}")
    page.evaluate(SET, ["body", "class", "vscode-dark"])
    page.evaluate(f"""() => {{
      const frame = document.createElement("iframe");
      frame.srcdoc = `<div id="v"></div><script type="module">
        import {{ mount, served }} from "{ORIGIN}/hookattn-viewer.js";
        mount(document.getElementById("v"), await served("{ORIGIN}/trace.safetensors"), {{}});</` + `script>`;
      document.body.append(frame);
    }}""")
    inside = page.frame_locator("iframe")
    inside.locator('.ha[data-theme="dark"]').wait_for(timeout=10_000)
    page.evaluate(SET, ["body", "class", "vscode-light"])
    inside.locator('.ha[data-theme="light"]').wait_for(timeout=5_000)


def test_a_viewer_that_is_gone_listens_no_more(open_page: Callable[..., Any], file: Path) -> None:
    page = open_page(color_scheme="light")
    # Other things of the page watch as well.
    page.add_init_script("""window.watching = 0;
      const { observe, disconnect } = MutationObserver.prototype;
      const ours = new Set();
      MutationObserver.prototype.observe = function (target, options) {
        if (options.attributeFilter?.includes("data-jp-theme-light")) ours.add(this);
        watching = ours.size;
        return observe.call(this, target, options);
      };
      MutationObserver.prototype.disconnect = function () {
        ours.delete(this);
        watching = ours.size;
        return disconnect.call(this);
      };""")
    show(page, file, "{}")
    assert page.evaluate("watching") == 1
    page.evaluate("viewer.destroy()")
    assert page.evaluate("watching") == 0
