"""``hookattn heads``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from ..analyze import MEASURES, report
from ..errors import SelectionError, TraceWriteError
from ..loading import load
from .command import Command
from .options import names
from .screen import Screen, counted

if TYPE_CHECKING:
    from pandas import DataFrame

SHOWN = ("entropy", "mean_distance", "previous_token", "first_token", "induction")
"""The measures that are shown where none is asked for; the files have all."""


@click.command(
    "heads",
    cls=Command,
    short_help="Show what each head of a trace does.",
    examples=(
        "hookattn heads run.safetensors",
        "hookattn heads run.safetensors --sort induction --top 10",
        "hookattn heads run.safetensors --measures entropy,confidence,sink",
        "hookattn heads run.safetensors --csv heads.csv",
        "hookattn heads run.safetensors --json | jq '.heads[] | select(.role != \"\")'",
    ),
)
@click.argument("file", type=click.Path())
@click.option(
    "--sort", metavar="MEASURE", help="The largest first (-MEASURE: the smallest); by default in the model's order."
)
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="Only the first N heads.")
@click.option("--measures", callback=names, metavar="NAME,…", help=f"Of {', '.join(MEASURES)}.")
@click.option("--csv", is_flag=False, flag_value="-", metavar="[FILE]", help="Write CSV, to stdout or a file.")
@click.option("--parquet", type=click.Path(), metavar="FILE", help="Write a Parquet file.")
@click.pass_obj
def command(
    screen: Screen,
    file: str,
    sort: str | None,
    top: int | None,
    measures: tuple[str, ...] | None,
    csv: str | None,
    parquet: str | None,
) -> None:
    """Show all heads of a trace FILE with their scores, and what a head is called where the evidence is clear."""
    if parquet is not None:
        import pyarrow  # noqa: F401 - before the work, as pandas asks for it after it
    trace = load(file)
    table = report(trace, measures)
    units = table.attrs["units"]
    if sort is not None:
        key = sort.removeprefix("-")
        if key not in units:
            why = table.attrs["left_out"].get(key)
            said = f"it is not defined here: {why}" if why else f"there are {', '.join(units)}"
            raise SelectionError(f"--sort {sort}: {said}.")
        table = table.sort_values(key, ascending=sort.startswith("-"), kind="stable", na_position="last")
    table = table.head(top) if top is not None else table
    if screen.as_json:
        data = {"file": file, "units": units, "left_out": table.attrs["left_out"], "heads": _plain(table)}
        screen.json(data)
    if csv == "-":
        click.echo(table.to_csv(index=False), nl=False)
    for path, write in ((csv, table.to_csv), (parquet, table.to_parquet)):
        if path is not None and path != "-":
            try:
                write(path, index=False)
            except OSError as error:
                raise TraceWriteError(f"{path}: cannot be written: {error.strerror or error}.") from error
            screen.say(f"wrote {path}: {counted(len(table), 'head')}")
    if not screen.as_json and csv is None and parquet is None:
        shown = [*(measures or SHOWN), *([sort.removeprefix("-")] if sort is not None else [])]
        _print(screen, table, [m for m in dict.fromkeys(shown) if m in units])


def _plain(table: DataFrame) -> list[dict[str, Any]]:
    """Rows as plain data; NaN as null."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(key): value for key, value in row.items()} for row in rows]


def _print(screen: Screen, table: DataFrame, measures: list[str]) -> None:
    """Where, the measures asked for, and the roles; what all rows have in common stands above."""
    units = table.attrs["units"]
    where = [c for c in ("step", "stack", "kind") if table[c].nunique() > 1]
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in (*where, "layer", "head"):
        shown.add_column(name, justify="left" if name in ("stack", "kind") else "right")
    for name in measures:
        shown.add_column(f"{name}\n[dim]{units[name]}[/dim]", justify="right")
    shown.add_column("role", overflow="fold")
    shown.add_column("evidence", style="dim", overflow="fold")
    for row in table.to_dict("records"):
        numbers = ["" if row[m] != row[m] else f"{row[m]:.2f}" for m in measures]
        place = ["?" if row[c] is None or row[c] != row[c] else f"{row[c]:.0f}" if c == "layer" else str(row[c])
                 for c in (*where, "layer", "head")]  # fmt: skip
        shown.add_row(*place, *numbers, Text(str(row["role"]), "green"), Text(str(row["evidence"])))
    screen.out.print(shown)
    for key, why in table.attrs["left_out"].items():
        screen.say(f"left out {key}: {why}", "dim")
