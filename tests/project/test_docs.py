"""The examples of the documentation run, in their order, page by page."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(
    "page", ["analyze.md", "edits.md", "gradients.md", "notebook.md", "statistics.md", "training.md"]
)
def test_the_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text(encoding="utf-8")
    # Of a page that is a notebook the cells, without the lines of their tags.
    blocks = re.findall(r"^```(?:python|\{code-cell\} ipython3)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks = [re.sub(r"^:[a-z-]+:.*\n", "", block) for block in blocks]
    assert blocks
    module = ModuleType("example_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    for block in blocks:
        exec(compile(block, page, "exec"), module.__dict__)


PAGES = sorted([*DOCS.glob("*.md"), *(DOCS.parent / name for name in ("README.md", "CONTRIBUTING.md"))])
# Where a page names a file of the project: from its root, or from hookattn/ as docs/architecture.md does.
NAMED = re.compile(r"`((?:[\w.-]+/)+[\w*.-]*|[\w/-]+\.(?:py|md|toml|tsx?))`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    gone = [link for link in found if not (page.parent / link).exists()]
    assert not gone, f"{page.name} links to {gone}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Path) -> None:
    root = DOCS.parent
    gone = []
    for name in NAMED.findall(re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)):
        top = name.partition("/")[0]
        if top not in ("hookattn", "tests", "docs", "adapters", "benchmarks", "examples", "requirements"):
            if page.name != "architecture.md" or not (root / "hookattn" / top).is_dir():
                continue  # a file of somebody else's, or of a reader's
            name = f"hookattn/{name}"
        if not list(root.glob(name)) and not list(root.glob(name + ".py")):
            gone.append(name)
    assert not gone, f"{page.name} names {gone}"


def test_the_architecture_page_has_every_package() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    packages = {path.parent.name for path in (DOCS.parent / "hookattn").glob("*/__init__.py")}
    named = set(re.findall(r"`(\w+)/`", text))
    assert packages <= named, f"docs/architecture.md does not say what these are: {sorted(packages - named)}"
