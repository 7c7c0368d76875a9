"""Whether every link within a built site leads somewhere, and it fetches nothing from elsewhere:
``python -m tests.project.site_links docs/_build/html``."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse


class _Page(HTMLParser):
    """The anchors of a page, where it links to, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = {"", "top"}
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors |= {name for name in (given.get("id"), given.get("name")) if name}
        if (address := given.get("href")) is not None:
            (self.loads if tag == "link" else self.links).append(address)
        if (address := given.get("src")) is not None:
            self.loads.append(address)


def problems_of_site(root: Path) -> list[str]:
    """Links to pages, files and anchors that are not there, and what a page would fetch from another host."""
    root = root.resolve()
    pages = {path: _Page(path.read_text("utf-8")) for path in sorted(root.rglob("*.html"))}
    if not pages:
        return [f"{root} has no pages"]
    found = []
    for path, page in pages.items():
        for address in (*page.links, *page.loads):
            parts, where = urlparse(address), path.relative_to(root)
            if parts.scheme or parts.netloc:
                if address in page.loads and parts.scheme != "data":
                    found.append(f"{where} fetches {address}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or not target.is_relative_to(root):
                found.append(f"{where} links to {address}, which is not there")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{where} links to {address}, and that page has no such anchor")
    return found


def main(folder: str) -> int:
    """Print what is wrong; 1 if anything is."""
    found = problems_of_site(Path(folder))
    print("\n".join(found) or "every link within the site leads somewhere, and it fetches nothing")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
