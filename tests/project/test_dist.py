"""What a release is made of, as far as nothing has to be built: `make dist` does the rest."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import hookattn
from tests.project.distributions import problems_of_metadata

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["project"]["dynamic"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "hookattn/version.py"
    cited = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.search(r"^version: (.+)$", cited, re.M)[1] == hookattn.__version__  # type: ignore[index]


def test_the_readme_reads_outside_of_the_repository() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    before = text
    for one in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(one["pattern"], one["replacement"].replace("$HFPR_VERSION", hookattn.__version__), text)
    assert problems_of_metadata(hookattn.__version__, text) == []
    assert problems_of_metadata(hookattn.__version__, before) != []
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", before):
        assert (ROOT / link).exists(), f"the README links to {link}, which is not there"


def test_placeholders_are_said_to_be_some() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert all(re.match(r"https://example\.org/", url) for url in PROJECT["project"]["urls"].values())
    assert "# Placeholders" in text and "placeholders" in (ROOT / "docs" / "releasing.md").read_text("utf-8")
