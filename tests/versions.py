"""Which versions of the dependencies the tests are right about, and what is newer here.

A release of a dependency is no fault of this tree. What a test finds because of one is reported as new, by its name
and with both versions; what the known version has and this tree lacks is a failure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "coverage.md"


class NewInDependencyWarning(UserWarning):
    """Something that a dependency has since the version that the tests know."""


def locked(files: Iterable[Path] | None = None) -> dict[str, str]:
    """The exact versions in requirements/*.txt that are for this Python and platform, by canonical name."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "requirements").glob("*.txt")) if files is None else files:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                wanted = Requirement(line.partition(" #")[0].rstrip(" \\"))
            except InvalidRequirement:
                continue  # a comment, an option or a hash
            pins = [s.version for s in wanted.specifier if s.operator == "=="]
            if pins and (wanted.marker is None or wanted.marker.evaluate()):
                found[canonicalize_name(wanted.name)] = pins[0]
    return found


def of_page(text: str) -> dict[str, str]:
    """The versions that docs/coverage.md says its rows are of."""
    named = re.search(r"transformers (\S+) maps .*?with torch (\S+):", text, re.DOTALL)
    if named is None:
        raise ValueError("docs/coverage.md does not say which versions of transformers and torch its rows are of")
    return {"transformers": named[1], "torch": named[2]}


@cache
def known() -> dict[str, str]:
    """The versions that the tests are right about: the locked ones; without a lock, those of docs/coverage.md."""
    return locked() or of_page(PAGE.read_text(encoding="utf-8"))


def newer(installed: str, wanted: str) -> bool:
    """Whether a version is later than another; builds of one version (``2.13.0+cpu``) are the same."""
    return Version(Version(installed).public) > Version(Version(wanted).public)


def ahead() -> list[str]:
    """The dependencies that are newer here than the tests know: ``name, known version, installed version`` each."""
    found = []
    for name, wanted in sorted(known().items()):
        try:
            here = version(name)
        except PackageNotFoundError:
            continue
        if newer(here, wanted):
            found.append(f"{name} {wanted} -> {here}")
    return found
