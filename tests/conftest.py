"""How many threads a worker of a parallel run has, and what a run says at its end about dependencies that are newer
than the tests know."""

from __future__ import annotations

import os
from typing import Any

from tests.versions import ahead

# Each worker would start a thread for each core. Where workers outnumber idle cores, those threads wait for each other
# in every small operation, and a model of the sweep took ten times as long. OpenMP reads this once, as torch is loaded,
# and subprocesses inherit it.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


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
            f"{len(red)} red with these. Those of them that are green with the known versions (`make test` in a fresh "
            "clone) are red because of what is new."
        )
