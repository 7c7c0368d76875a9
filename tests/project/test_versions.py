"""What counts as newer than the versions that the tests know, and that a run says so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest, versions


def test_pins_are_read_with_their_markers(tmp_path: Path) -> None:
    file = tmp_path / "dev.txt"
    file.write_text(
        "# made by a tool\n"
        "--index-url https://example.org\n"
        "Torch_Geometric==2.8.1\n"
        "numpy==2.2.6 ; python_version < '3.0'\n"
        "numpy==2.5.1 ; python_version >= '3.0'\n"
        "appnope==1.0.0 ; sys_platform == 'nowhere'\n"
        "transformers==5.24.0 \\\n"
        "    --hash=sha256:00\n"
        "scipy==1.16.0  # via statsmodels\n"
        "loose>=1\n"
    )
    assert versions.locked([file]) == {
        "torch-geometric": "2.8.1",
        "numpy": "2.5.1",
        "transformers": "5.24.0",
        "scipy": "1.16.0",
    }


def test_versions_are_compared_as_numbers_and_without_their_build() -> None:
    assert versions.newer("5.10.0", "5.9.1") and versions.newer("2.13.1+cpu", "2.13.0")
    assert not versions.newer("5.9.1", "5.10.0") and not versions.newer("2.13.0+cpu", "2.13.0")


def test_without_a_lock_the_page_of_rows_is_what_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "coverage.md"
    page.write_text(
        "Every model type that transformers 5.1.0 maps (3 of them, towers\ncounted), with torch 2.9.0+cpu: x"
    )
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setattr(versions, "PAGE", page)
    versions.known.cache_clear()
    try:
        assert versions.known() == {"transformers": "5.1.0", "torch": "2.9.0+cpu"}
        (tmp_path / "requirements").mkdir()
        (tmp_path / "requirements" / "dev.txt").write_text("transformers==5.2.0\n")
        versions.known.cache_clear()
        assert versions.known() == {"transformers": "5.2.0"}
    finally:
        versions.known.cache_clear()
    with pytest.raises(ValueError, match="does not say"):
        versions.of_page("# Coverage")


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ("5.2.0", ["transformers 5.1.0 -> 5.2.0", "2 red with these. "]),
        ("5.1.0", []),
        ("5.0.0", []),
    ],
)
def test_a_run_says_at_its_end_what_is_newer(here: str, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "transformers":
            return here
        raise versions.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "known", lambda: {"transformers": "5.1.0", "not-here": "1.0"})
    monkeypatch.setattr(versions, "version", version)
    lines: list[str] = []
    red = [SimpleNamespace(nodeid="tests/test_x.py::test_y")]
    reporter: Any = SimpleNamespace(
        stats={"failed": red, "error": red, "passed": red}, section=lines.append, write_line=lines.append
    )
    conftest.pytest_terminal_summary(reporter)
    assert len(lines) == (3 if said else 0)
    for word, line in zip(said, lines[1:], strict=True):
        assert line.startswith(word)
