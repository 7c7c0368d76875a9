"""docs/coverage.md, from the rows."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_MEANS = {
    "green": "exact",
    "red": "**red**",
    "none": "no softmax attention",
    "refused": "not offered by the model",
    "unbuilt": "not run",
}
HEAD = """# Coverage

Made by `make coverage`; do not edit. Every model type that transformers {transformers} maps ({types} of them, towers
and sub-models counted), with torch {torch}: tiny, from its own configuration class, random weights that make attention
far from uniform, three rows (whole, padded left, padded right where it takes a mask), in eager and in sdpa.

**Exact** means that all of this holds: the traced output is bit-identical to the untraced one; nothing is left on the
model; in float64, `softmax(where(mask, scores, -inf), sinks) == weights` and `weights @ v == output` for every call;
every certificate is faithful with `verify="full"`; the weights are what the eager model returns with
`output_attentions=True`, where it does (to 1e-4); no module computed more softmaxes than there are calls and skipped
sites; what was skipped is no softmax attention; and each axis, kind, layer and step is what it is called, by the head
counts, the inputs and the order of the modules themselves. A row where one of these fails is **red**, and says which.

{summary}
"""


@dataclass(frozen=True)
class Coverage:
    """What a page says.

    Attributes:
        transformers: the version that its rows are of.
        count: how many types it says to have.
        types: the types that have a row or a reason why they are not run, sorted.
        unrun: those that are not run in an implementation or in both, for a reason that it gives.
        red: its red rows.
    """

    transformers: str
    count: int
    types: tuple[str, ...]
    unrun: tuple[str, ...]
    red: tuple[str, ...]


def read(path: str | Path) -> Coverage:
    """What a page that :func:`write` wrote says.

    Raises:
        ValueError: it is no such page.
    """
    text = Path(path).read_text(encoding="utf-8")
    named = re.search(r"transformers (\S+) maps \((\d+) of them", text)
    if named is None:
        raise ValueError(f"{path} does not say which transformers it is of, and how many types that maps")
    parts = {title: body for title, _, body in (part.partition("\n") for part in text.split("\n## ")[1:])}
    types = re.findall(r"^\| `([^`]+)` \|", parts.get("Every type", ""), re.MULTILINE)
    unrun = re.findall(r"^- `([^`]+)`", parts.get("Not run, and why", ""), re.MULTILINE)
    red = re.findall(r"^- (.*)", parts.get("Red rows", ""), re.MULTILINE)
    return Coverage(named[1], int(named[2]), tuple(sorted({*types, *unrun})), tuple(unrun), tuple(red))


def write(path: str | Path, rows: list[Row], seconds: float) -> None:
    """Write the page."""
    types: dict[str, dict[str, Row]] = {}
    for row in rows:
        types.setdefault(row["model_type"], {})[row["implementation"]] = row
    page = HEAD.format(
        transformers=version("transformers"), torch=version("torch"), types=len(types), summary=_summary(rows, seconds)
    )
    sections = [page, _red(rows), _table(types), _unbuilt(types), _skips(rows), _notes(rows)]
    Path(path).write_text("\n".join(s for s in sections if s) + "\n")


def _summary(rows: list[Row], seconds: float) -> str:
    lines = ["| | eager | sdpa |", "|---|---|---|"]
    counts = {i: Counter(r["status"] for r in rows if r["implementation"] == i) for i in ("eager", "sdpa")}
    lines += [f"| {text} | {counts['eager'][s]} | {counts['sdpa'][s]} |" for s, text in _MEANS.items()]
    calls = sum(r.get("calls", 0) for r in rows)
    compared = sum(r.get("compared", 0) for r in rows)
    flat = [r["flat"] for r in rows if r.get("calls")]
    median = sorted(flat)[len(flat) // 2] if flat else 0.0
    took = f" The run took {seconds / 60:.0f} minutes." if seconds > 60 else ""
    lines += [
        "",
        f"{calls} calls in all, {compared} of them compared with the model's own attentions. In the median case, the "
        f"flattest call has a mean entropy of {median:.2f} of a uniform row's.{took}",
    ]
    return "\n".join(lines)


def _red(rows: list[Row]) -> str:
    lines = [
        f"- `{r['model_type']}` in {r['implementation']}: {_cut('; '.join(r['problems']), 500)}"
        for r in rows
        if r["status"] == "red"
    ]
    return "\n".join(["## Red rows", "", *lines, ""]) if lines else "## Red rows\n\nNone.\n"


def _table(types: dict[str, dict[str, Row]]) -> str:
    lines = [
        "## Every type",
        "",
        "| model type | class | eager | sdpa | captured | largest error | own attentions | flattest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, both in sorted(types.items()):
        if all(r["status"] == "unbuilt" for r in both.values()):
            continue
        first = max(both.values(), key=lambda r: r.get("calls", 0))
        errors = [r["error"] for r in both.values() if r.get("calls")]
        offered = next((r["offered"] for r in both.values() if r.get("offered") is not None), None)
        cells = [
            f"`{name}`",
            first.get("model", ""),
            *(_cell(both.get(i)) for i in ("eager", "sdpa")),
            ", ".join(f"{n} {kind}" for kind, n in first.get("kinds", {}).items()),
            f"{max(errors):.0e}" if errors else "",
            f"{offered:.0e}" if offered is not None else "",
            f"{first['flat']:.2f}" if first.get("calls") else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    taps = (
        "" if row["status"] not in ("green", "red") else ", ".join(f"{n} {t}" for t, n in row.get("taps", {}).items())
    )
    return f"{_MEANS[row['status']]}{': ' + taps if taps else ''}"


def _unbuilt(types: dict[str, dict[str, Row]]) -> str:
    lines = ["## Not run, and why", ""]
    for name, both in sorted(types.items()):
        rows = [r for r in both.values() if r["status"] == "unbuilt"]
        if rows:
            only = f" in {rows[0]['implementation']}" if len(rows) < len(both) else ""
            lines.append(f"- `{name}`{only}: {_cut(rows[0].get('reason', ''), 220)}")
    return "\n".join([*lines, ""]) if len(lines) > 2 else ""


def _skips(rows: list[Row]) -> str:
    reasons: dict[str, set[str]] = {}
    for row in rows:
        for skipped in row.get("skipped", []):
            reasons.setdefault(skipped.partition(": ")[2], set()).add(row["model_type"])
    lines = [f"- {reason}: {', '.join(f'`{t}`' for t in sorted(found))}" for reason, found in sorted(reasons.items())]
    return "\n".join(["## What is in `trace.skipped`", "", *lines, ""]) if lines else ""


def _notes(rows: list[Row]) -> str:
    found: dict[str, set[str]] = {}
    for row in rows:
        for note in row.get("notes", []):
            text = re.sub(r"^[\w.\[\]]*attentions[\w.\[\]]*: ", "own attentions: ", note)
            found.setdefault(re.sub(r"nearly uniform: .*", "a call that stays nearly uniform", text), set()).add(
                row["model_type"]
            )
    lines = [
        f"- {_cut(note, 200)}: {', '.join(f'`{t}`' for t in sorted(where))}" for note, where in sorted(found.items())
    ]
    return "\n".join(["## Notes", "", *lines]) if lines else ""


def _cut(text: str, most: int) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= most else text[: most - 1] + "…"
