"""The HTML around the viewer, which the self-contained page and the served one have in common."""

from __future__ import annotations

import base64
import hashlib
import html
from functools import cache
from importlib.resources import files

from ..errors import RenderError

MODULE = "hookattn-viewer.js"

_STYLE = """
html, body { margin: 0; height: 100%; }
body { font: 15px/1.5 system-ui, sans-serif; color-scheme: light dark; }
#viewer { min-height: 100%; }
.said { max-width: 44rem; margin: 4rem auto; padding: 0 1.5rem; }
"""

_BOOT = """
const box = document.getElementById("viewer");
try {
  const { mount, source, compare, options } = await open();
  // Inside a frame of a notebook there is no address to keep the selection in.
  const link = location.protocol !== "about:";
  // For programs, and for a reader at the console.
  globalThis.viewer = mount(box, source, { ...options, link, ...(compare && { compare }) });
} catch (error) {
  const said = document.createElement("p");
  said.className = "said";
  said.setAttribute("role", "alert");
  said.textContent = error instanceof Error ? error.message : String(error);
  box.replaceChildren(said);
}
"""


@cache
def viewer_module() -> str:
    """The viewer's ES module.

    Raises:
        RenderError: it is not installed.
    """
    try:
        return files("hookattn.render").joinpath("viewer", MODULE).read_text("utf-8")
    except FileNotFoundError as error:
        raise RenderError(f"the viewer's module {error.filename} is missing. Install hookattn again.") from error


def module_script(body: str) -> str:
    """The text of the page's module script.

    Args:
        body: JavaScript that imports the viewer and returns ``{mount, source, compare, options}``, or throws.
    """
    return f"async function open() {{\n{body}\n}}{_BOOT}"


def content_policy(text: str, *, module: str, connect: str) -> str:
    """A Content-Security-Policy: no script but this one and the module, and nothing fetched but from ``connect``."""
    # Tokens and titles come from anywhere. Should one ever get into the page as HTML, the browser runs no script of it,
    # as its hash is another, and sends nothing anywhere.
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}' {module}; worker-src blob: data:; connect-src {connect}; "
        "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
    )


def page_head(title: str, policy: str = "") -> str:
    """The page down to where data can stand; the tail closes what it opens."""
    meta = f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">\n' if policy else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{meta}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        '<main id="viewer"><noscript><p class="said">The attention in this page is drawn by a script: allow scripts '
        "for it.</p></noscript></main>\n"
    )


def page_tail(text: str) -> str:
    """The module script and the end of the page."""
    return f'<script type="module">{text}</script>\n</body>\n</html>\n'
