"""``python -m benchmarks.same_weights [PAGE]``: read, make and open everything; print it, and write the page."""

from __future__ import annotations

import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from .page import measured, page, table
from .views import CHROMIUM, VIEWS, chromium, seen, traced

NEEDED = ("transformer_lens", "nnsight", "bertviz", "circuitsvis", "playwright")
TOKENS = (32, 128)


def main(arguments: list[str]) -> int:
    """Nothing is written where something is missing: a page is of all of it."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if not Path(CHROMIUM).exists():
        missing.append("chromium")
    if missing:
        print(f"not installed: {', '.join(missing)}; make compare installs the libraries", file=sys.stderr)
        return 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answers = measured()
    print("\n".join(table(answers)[: len(answers) + 2]))
    with chromium() as browser:
        pages = {n: {view: seen(view, trace, browser) for view in VIEWS} for n in TOKENS for trace in [traced(n)]}
    for path in arguments:
        Path(path).write_text(page(answers, pages), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
