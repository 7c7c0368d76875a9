"""Rows on disk: one JSON document a line, under a header that says which versions and sources they are of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .pool import ROOT


def key() -> dict[str, str]:
    """What a row depends on: the libraries, and the sources of this one and of the sweep itself."""
    digest = hashlib.sha256()
    for folder in ("hookattn", "adapters", "tests/sweep"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if file.name in ("report.py", "__main__.py") and file.parent.name == "sweep":
                continue  # what is made of rows
            digest.update(file.read_bytes())
    return {
        "transformers": version("transformers"),
        "torch": version("torch"),
        "sources": digest.hexdigest()[:16],
    }


class Results:
    """Rows by (model type, implementation), written as they come.

    Args:
        path: the file; None: they are only held.
        resume: start with the rows of the file, if it is of the same versions and sources.
        without: start with the rows of the file in any case, but for these types (while recipes are written).
    """

    def __init__(self, path: str | Path | None, resume: bool = False, without: Iterable[str] | None = None):
        self.path = None if path is None else Path(path)
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        if self.path is None:
            return
        head = key()
        if (resume or without) and self.path.exists():
            lines = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
            if lines and (without or lines[0] == head):
                rows = [r for r in lines[1:] if r["model_type"] not in set(without or ())]
                self.rows = {(r["model_type"], r["implementation"]): r for r in rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(x) + "\n" for x in (head, *self.rows.values())))

    def __contains__(self, case: object) -> bool:
        return case in self.rows

    def add(self, row: dict[str, Any]) -> None:
        """Hold a row and write it."""
        self.rows[row["model_type"], row["implementation"]] = row
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def ordered(self, cases: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
        """The rows of these cases, in their order."""
        return [self.rows[c] for c in cases if c in self.rows]
