"""A trace as a table for people and as plain data for programs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..attention.kernel_call import DOT
from ..attention.normalizers import SOFTMAX
from ..calls.call import Call, guessed_axes
from ..calls.certificate import Certificate
from ..calls.edits import edits_in_words
from ..calls.extents import extents_of
from ..calls.shard import Shard
from ..store import LazyFile
from ..traces import Trace
from .screen import counted, decimal_size, plain

_EDITS = 8  # so many edits that differ are listed
_STYLES = {"faithful": "green", "unfaithful": "bold red", "unverified": "yellow"}


def call_as_json(call: Call) -> dict[str, Any]:
    """One call as plain data."""
    site, certificate = call.site, call.certificate
    return {
        "index": call.index,
        "step": call.step,
        "layer": site.layer,
        "stack": site.stack,
        "kind": site.kind,
        "path": site.path,
        "module": site.module,
        "axes": site.axes,
        "extents": extents_of(call).known(),
        "entry": call.entry,
        "tap": call.tap,
        "score": call.score,
        "normalizer": call.normalizer,
        "basis": dict(call.basis),
        "dtype": str(call.dtype).removeprefix("torch."),
        "scale": None if isinstance(call.scale, Tensor) else call.scale,
        "softcap": call.softcap,
        "causal": call.causal,
        "window": call.window,
        "dropout": call.dropout,
        "heads": call.heads,
        "queries": call.queries,
        "of_queries": call.of_queries,
        "shards": [asdict(shard) for shard in call.shards],
        "fields": [name for name in call.fields if call.fields[name] is not None],
        "derivable": [name for name in call.derivable if name not in call.fields],
        "notes": list(call.notes),
        "edits": [asdict(edit) for edit in call.edits],
        "certificate": {**certificate.to_json(), "faithful": certificate.faithful},
    }


def trace_as_json(trace: Trace) -> dict[str, Any]:
    """A trace as plain data; with its file's sizes if it is in one."""
    model = {k: v for k, v in trace.model.items() if k != "versions"}
    made: dict[str, Any] = {
        "file": trace.path,
        "model": model,
        "versions": trace.model.get("versions", {}),
        "selection": trace.selection,
        "faithful": trace.faithful,
        "tokens": trace.tokens,
        "stack_tokens": trace.stack_tokens,
        "notes": trace.notes,
        "skipped": [{"path": s.path, "reason": s.reason, "steps": list(s.steps)} for s in trace.skipped],
        "calls": [call_as_json(call) for call in trace.calls],
    }
    if trace.path is not None:
        with LazyFile(trace.path) as file:
            sizes: dict[str, int] = {}
            for name in file:
                kind = name.split("/")[1] if name.startswith("shared/") else name.rsplit("/", 1)[-1]
                sizes[kind] = sizes.get(kind, 0) + file.shape(name).numel() * file.dtype(name).itemsize
            document = file.document
            made |= {
                "format_version": document.get("format_version"),
                "compact": document.get("compact", False),
                "bytes": os.path.getsize(trace.path),
                "tensors": len(file),
                "bytes_of_fields": sizes,
            }
    return made


def share_of_tolerance(certificate: Certificate) -> float:
    """How much of what is allowed was used up: above 1 a call is unfaithful."""
    # As a certificate judges: a row sum is of many roundings, and may be off by four times what a weight may.
    unit = certificate.weights_tolerance or 1.0
    return max(
        certificate.output_error / (certificate.tolerance or 1.0),
        (certificate.weights_error or 0.0) / unit,
        certificate.row_sum_error / (4 * unit),
    )


class CallRow:
    """Calls that are one row: one call, or what one site did in many steps."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls, self.first = calls, calls[0]
        self.worst: Certificate = max(
            (c.certificate for c in calls),
            key=lambda c: (c.status == "unfaithful", c.status == "unverified", share_of_tolerance(c)),
        )

    def steps(self) -> str:
        """``3``, or ``0–7``."""
        steps = sorted({c.step for c in self.calls})
        return str(steps[0]) if len(steps) == 1 else f"{steps[0]}–{steps[-1]}"

    def shape(self) -> str:
        """``B1 H12 T7 S7 D32``, with ranges where the calls differ."""
        sizes = [extents_of(c).known() for c in self.calls]
        letters = [x for x in "BHGTSDE" if any(x in s for s in sizes)]
        parts = []
        for letter in letters:
            values = [s[letter] for s in sizes if letter in s]
            same = (letter == "G" and values == [s.get("H") for s in sizes]) or (
                letter == "E" and values == [s.get("D") for s in sizes]
            )
            if not same:
                low, high = min(values), max(values)
                parts.append(f"{letter}{low}" if low == high else f"{letter}{low}–{high}")
        return " ".join(parts) or "?"

    def verdict(self) -> str:
        """What the certificate says, and beside it the axes that nothing but convention tells from others, and whether
        it was edited."""
        edited = "edited" if any(c.edits for c in self.calls) else ""
        return ", ".join(filter(None, (self.worst.status, guessed_axes(self.calls), edited)))

    def error(self) -> str:
        """The largest distance between what was rebuilt and what the kernel returned."""
        return "" if self.worst.status == "unverified" else f"{self.worst.max_error:.1e}"

    def checked_rows(self) -> str:
        """How many query rows were checked."""
        worst = self.worst
        return (
            ""
            if worst.status == "unverified"
            else "all rows"
            if worst.rows == worst.of_rows
            else (f"{worst.rows} of {worst.of_rows} rows")
        )


COLUMNS: dict[str, Callable[[CallRow], str]] = {
    "step": CallRow.steps,
    "layer": lambda row: "?" if row.first.site.layer is None else str(row.first.site.layer),
    "stack": lambda row: row.first.site.stack,
    "kind": lambda row: row.first.site.kind,
    "path": lambda row: row.first.site.label,
    "shape": CallRow.shape,
    "entry": lambda row: row.first.entry,
    "tap": lambda row: row.first.tap,
    "score": lambda row: row.first.score,
    "normalizer": lambda row: row.first.normalizer,
    "dtype": lambda row: str(row.first.dtype).removeprefix("torch."),
    "checked": CallRow.checked_rows,
    "error": CallRow.error,
    "certificate": CallRow.verdict,
}
_HOISTED = ("stack", "kind", "entry", "tap", "score", "normalizer", "dtype", "checked")
# What goes without saying: columns that are there where some call has something else.
_PLAIN = {"entry": "", "score": DOT, "normalizer": SOFTMAX}


def call_rows(calls: Iterable[Call], every: bool = False) -> list[CallRow]:
    """One row for each site, or for each call."""
    groups: dict[Any, list[Call]] = {}
    for call in calls:
        kind = (call.tap, call.score, call.normalizer)
        key = call.index if every else (call.site, call.entry, kind, call.dtype, call.heads)
        groups.setdefault(key, []).append(call)
    return [CallRow(group) for group in groups.values()]


def print_calls(out: Console, calls: Sequence[Call], every: bool = False) -> None:
    """The table of calls. What all of them have in common stands above it, once."""
    rows = call_rows(calls, every)
    if not rows:
        return
    texts = {name: [column(row) for row in rows] for name, column in COLUMNS.items()}
    names = [name for name in COLUMNS if name != "step" or len({c.step for c in calls}) > 1]
    names = [name for name in names if name not in _PLAIN or {*texts[name]} != {_PLAIN[name]}]
    common = [name for name in names if name in _HOISTED and len(set(texts[name])) == 1]
    width = sum(max(map(len, [name, *texts[name]])) + 2 for name in names if name not in common) - 2
    if width > out.width and len(set(texts["certificate"])) == 1:
        common.append("certificate")  # the narrower the terminal, the more goes without saying twice
    if common:
        said = [f"{'' if name == 'dtype' else name} {texts[name][0]}".strip() for name in common if texts[name][0]]
        _print_facts(out, [("all calls", " · ".join(said))])
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        if name not in common:
            table.add_column(
                name, justify="right" if name in ("step", "layer") else "left", overflow="fold", no_wrap=name != "path"
            )
    for i, row in enumerate(rows):
        table.add_row(
            *(plain(texts[n][i], _style(row) if n == "certificate" else "") for n in names if n not in common)
        )
    out.print(Text())
    out.print(table)
    out.print(Text())


def _style(row: CallRow) -> str:
    """A guess is marked as what was not verified is: nothing speaks against it, and nothing for it."""
    guessed = row.worst.status == "faithful" and bool(guessed_axes(row.calls))
    return _STYLES["unverified" if guessed else row.worst.status]


def lines_beside(calls: Sequence[Call]) -> list[tuple[str, str]]:
    """Lines and their styles on what a reader has to know and no certificate says: axes that were guessed, what was
    edited, weights that were changed after the softmax."""
    lines = []
    guessed = [c for c in calls if c.guessed]
    if guessed:
        text = (
            f"{guessed_axes(guessed)} in {len(guessed)} of {counted(len(calls), 'call')}, by convention, which no "
            "certificate can tell; layout= (hookattn trace --layout PATH=BTHD) or an adapter settles it"
        )
        lines.append((text, "yellow"))
    for said, some in _edited(calls):
        where = ", ".join([*some[:4], "…"] if len(some) > 4 else some)
        lines.append((f"{said}: {counted(len(some), 'call')} ({where})", "yellow"))
    changed = sum(c.fields.get("applied") is not None for c in calls)
    if changed:
        said = f"{counted(changed, 'call')} changed the weights after the softmax"
        lines.append((f"{said}: `weights` are those before, `applied` is what met the values", "dim"))
    return lines


def _edited(calls: Sequence[Call]) -> list[tuple[str, list[str]]]:
    """What was edited, and in which calls; many that differ are counted."""
    places: dict[str, list[str]] = {}
    for call in calls:
        if call.edits:
            places.setdefault(edits_in_words(call.edits), []).append(call.site.label)
    found = list(places.items())
    if len(found) > _EDITS:
        rest = [label for _, some in found[_EDITS:] for label in some]
        found = [*found[:_EDITS], (f"edited in {len(found) - _EDITS} more ways", rest)]
    return found


def print_beside(out: Console, calls: Sequence[Call]) -> None:
    """Print :func:`lines_beside`."""
    for text, style in lines_beside(calls):
        out.print(plain(text, style))


def print_verdict(out: Console, trace: Trace) -> None:
    """One line on the certificates, and what was skipped."""
    for skipped in trace.skipped:
        out.print(plain(f"skipped {skipped.path or '<model>'}: {skipped.reason}", "yellow"))
    for note in dict.fromkeys([*trace.notes, *(n for c in trace.calls for n in c.notes)]):
        out.print(plain(f"note: {note}", "dim"))
    print_beside(out, trace.calls)
    status = [c.certificate.status for c in trace.calls]
    bad, unknown = status.count("unfaithful"), status.count("unverified")
    total = counted(len(status), "call")
    if bad:
        out.print(Text(f"{bad} of {total} unfaithful: not what the model's own kernel returned", "bold red"))
    elif unknown:
        out.print(Text(f"{unknown} of {total} unverified", "yellow"))
    elif trace.calls:
        largest = max(c.certificate.max_error for c in trace.calls)
        share = max(share_of_tolerance(c.certificate) for c in trace.calls)
        said = f"largest error {largest:.1e}, at most {share:.1%} of what is allowed"
        out.print(Text(f"{total} faithful; {said}", "green"))


def print_head(out: Console, data: dict[str, Any]) -> None:
    """The lines above the table: the file, the model, the tokens."""
    steps = len({c["step"] for c in data["calls"]})
    count = f"{counted(len(data['calls']), 'call')} in {counted(steps, 'step')}"
    if data["file"] is not None:
        version = ".".join(map(str, data["format_version"] or ()))
        kind = f"format {version}{', compact' if data['compact'] else ''}"
        name = os.path.basename(data["file"])
        line = Text.assemble(plain(name, "bold"), f" · {decimal_size(data['bytes'])} · {kind} · {count}")
    else:
        line = Text(count)
    out.print(line)
    facts = [
        ("model", f"{data['model'].get('class', '?')} ({data['model'].get('module', '?')})"),
        ("versions", " · ".join(f"{k} {v}" for k, v in data["versions"].items())),
    ]
    shards = dict.fromkeys(str(Shard(**shard)) for call in data["calls"] for shard in call["shards"])
    facts += [("" if i else "part", shard) for i, shard in enumerate(shards)]
    if data.get("bytes_of_fields"):
        facts.append(("fields", " · ".join(f"{k} {decimal_size(v)}" for k, v in data["bytes_of_fields"].items())))
    stacks = data["stack_tokens"]
    own = {} if data["tokens"] in stacks.values() else {"": data["tokens"] or []}
    for name, rows in (own | stacks).items():
        for i, row in enumerate(rows[:4]):
            shown = " ".join(row[:24]) + (" …" if len(row) > 24 else "")
            facts.append(("" if i else f"tokens {name}".strip(), f"{shown} ({len(row)})"))
        if len(rows) > 4:
            facts.append(("", f"and {len(rows) - 4} more rows of tokens"))
    _print_facts(out, facts)


def _print_facts(out: Console, facts: Sequence[tuple[str, str]]) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(min_width=9, style="dim")
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(plain(name), plain(value))
    out.print(grid)
