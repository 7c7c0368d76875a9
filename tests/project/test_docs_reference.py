"""The site's reference has every public name, and each says what it is."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

from tests.project import public_api

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```\{public-names\} (\S+)\n(.*?)^```", re.M | re.S)


def listed() -> dict[str, set[str]]:
    """Package → the names of it that stand in the reference."""
    found: dict[str, set[str]] = {}
    for page in sorted((DOCS / "reference").glob("*.md")):
        for package, options in BLOCK.findall(page.read_text("utf-8")):
            module = importlib.import_module(package)
            names = set(public_api.names_of(module))
            if only := re.search(r"^:only: (.+)$", options, re.M):
                unknown = set(only[1].split()) - names
                assert not unknown, f"{page.name} lists {sorted(unknown)}, which {package} has not"
                names = set(only[1].split())
            elif ":errors:" in options:
                values = ((name, getattr(module, name)) for name in names)
                names = {n for n, v in values if inspect.isclass(v) and issubclass(v, BaseException)}
            found.setdefault(package, set()).update(names)
    return found


@pytest.mark.parametrize("package", public_api.MODULES)
def test_every_public_name_is_in_the_reference(package: str) -> None:
    module = importlib.import_module(package)
    missing = set(public_api.names_of(module)) - listed().get(package, set()) - {"edit"}
    assert not missing, f"not in docs/reference: {sorted(missing)} of {package}"


@pytest.mark.parametrize("package", public_api.MODULES)
def test_every_public_name_says_what_it_is(package: str) -> None:
    module = importlib.import_module(package)
    silent = []
    for name in public_api.names_of(module):
        value = getattr(module, name)
        if (inspect.isclass(value) or inspect.isroutine(value)) and not inspect.getdoc(value):
            silent.append(name)
        if inspect.isclass(value) and value.__module__.startswith("hookattn"):
            own = {
                n: v
                for n, v in vars(value).items()
                if n[0] != "_" and not n.startswith("test_") and (callable(v) or isinstance(v, property))
            }
            silent += [f"{name}.{n}" for n, v in own.items() if not inspect.isclass(v) and not inspect.getdoc(v)]
    assert not silent, f"without a docstring: {silent} of {package}"


def test_every_page_is_in_the_site() -> None:
    index = (DOCS / "index.md").read_text("utf-8") + (DOCS / "reference" / "index.md").read_text("utf-8")
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix("").as_posix()
        if page.name == "index.md" or "_build" in page.parts:
            continue
        short = name.removeprefix("reference/")
        globs = [g for g in ("concepts/*", "comparison*") if g in index and Path(name).match(g)]
        assert re.search(rf"^{re.escape(short)}$", index, re.M) or globs, f"{name} is in no table of contents"
