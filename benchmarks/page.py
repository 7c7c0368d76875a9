"""The tables of docs/speed.md, of the numbers of a run.

Each cell is a ratio to the untraced forward with the allocator's defaults. Where it was measured, the ratio with freed
memory kept stands behind it.

    python -m benchmarks.page out/bench.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import variants as v
from .cases import FUSED, HAND, LIBRARIES, cases
from .peers import BRIDGE, NNSIGHT

_NAMES = {
    v.TRACE: "trace",
    v.BLOCK: "in a block",
    v.ALL: "trace + all weights",
    v.OUTPUT_ATTENTIONS: "`output_attentions`",
    BRIDGE: "TransformerBridge",
    NNSIGHT: "nnsight",
}
_TITLES = {HAND: "Attention written by hand", LIBRARIES: "Other libraries' models", FUSED: "Fused kernels"}


def page(found: Mapping[str, Any]) -> str:
    """Markdown: a table for each group of cases that was measured; what no case of a group has is no column of it.

    Args:
        found: what ``python -m benchmarks --json`` writes.
    """
    parts = []
    for group, title in _TITLES.items():
        names = [c.name for c in cases() if c.group == group and c.name in found["cases"]]
        if names:
            parts.append(f"## {title}\n\n{_table(names, found)}")
    return "\n\n".join(parts)


def _table(names: Sequence[str], found: Mapping[str, Any]) -> str:
    kept = found.get("freed memory kept", {}).get("cases", {})
    cells = {(name, of): _cell(name, of, found["cases"], kept) for name in names for of in _NAMES}
    columns = [of for of in _NAMES if any(cells[name, of] for name in names)]
    lines = [["model", *(_NAMES[of] for of in columns)], ["---"] * (1 + len(columns))]
    lines += [[name, *(cells[name, of] for of in columns)] for name in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(name: str, variant: str, *runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    rows = [row for run in runs for row in run.get(name, ()) if row["name"] == variant and row["left_out"] is None]
    return ", ".join(format(row["ratio"], ".2f") for row in rows)


if __name__ == "__main__":
    print(page(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
