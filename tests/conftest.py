"""What a run says at its end about dependencies that are newer than the tests know."""

from __future__ import annotations

from typing import Any

from tests.versions import ahead


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found = ahead()
    if not found:
        return
    red = [r.nodeid for key in ("failed", "error") for r in terminalreporter.stats.get(key, [])]
    terminalreporter.section("newer than the versions that the tests know")
    for line in found:
        terminalreporter.write_line(line)
    if red:
        terminalreporter.write_line(
            f"{len(red)} red with these. What is green with the known versions (`make test` in a fresh clone) is red "
            "because of what is new."
        )
