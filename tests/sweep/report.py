"""docs/coverage.md, from the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write(path: str, rows: list[dict[str, Any]], seconds: float) -> None:
    """Write the page."""
    Path(path).write_text("\n".join(f"{r['model_type']} {r['implementation']} {r['status']}" for r in rows))
