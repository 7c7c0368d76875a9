"""``python -m benchmarks.side_by_side [PAGE]``: run the experiments, print how far results differ, write the page."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from .experiments import LIBRARIES, OURS, apart, lens_with_cache, run
from .page import page


def main(arguments: list[str]) -> int:
    """Run what is installed; a page needs all of it."""
    missing = [library.name for library in LIBRARIES if not library.installed]
    ours, measured = run(OURS), {}
    for library in LIBRARIES:
        if library is OURS or not library.installed:
            continue
        measured[library.name] = gaps = apart(ours, run(library))
        for name, gap in gaps.items():
            print(f"{library.name:16} {name:18} {gap:.1e}")
    if missing:
        print(f"not installed: {', '.join(missing)}; make compare installs them", file=sys.stderr)
        return 1
    for path in arguments:
        Path(path).write_text(page(measured, lens_with_cache()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
