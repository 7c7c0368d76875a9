"""``hookattn compare``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from ..analyze import compare
from ..console.screen import Screen, counted, plain
from ..traces import load
from .command import Command
from .heads import json_rows, place_text, sorted_by, write_table

if TYPE_CHECKING:
    from pandas import DataFrame

_MOST = 12
"""Heads that are shown where nobody says how many."""


@click.command(
    "compare",
    cls=Command,
    short_help="Hold two trace files against each other, head by head.",
    examples=(
        "hookattn compare before.safetensors after.safetensors",
        "hookattn compare before.safetensors after.safetensors --sort output_difference --top 20",
        "hookattn compare before.safetensors after.safetensors --csv heads.csv",
        "hookattn compare before.safetensors after.safetensors --json | jq '.heads[0]'",
    ),
)
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option(
    "--sort", metavar="MEASURE", help="The largest first (-MEASURE: the smallest); by default total_variation."
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Only the first N heads; in the terminal by default {_MOST}.",
)
@click.option("--stitch", is_flag=True, help="Put the steps of a generation together first, in both.")
@click.option("--csv", is_flag=False, flag_value="-", metavar="[FILE]", help="Write CSV, to stdout or a file.")
@click.option("--parquet", type=click.Path(), metavar="FILE", help="Write a Parquet file.")
@click.pass_obj
def command(
    screen: Screen,
    a: str,
    b: str,
    sort: str | None,
    top: int | None,
    stitch: bool,
    csv: str | None,
    parquet: str | None,
) -> None:
    """Show how far each head of trace file A is from the same head of trace file B, those that changed most first.

    The files are of the same calls, heads and extents: two prompts of one length, two checkpoints, with and without an
    edit.
    """
    if parquet is not None:
        import pyarrow  # noqa: F401 - before the work, as pandas asks for it after it
    one, other = (load(file).stitch() if stitch else load(file) for file in (a, b))
    table = compare(one, other)
    if sort is not None:
        table = sorted_by(table, sort)
    heads = len(table)
    table = table.head(top) if top is not None else table
    if screen.as_json:
        screen.json({"a": a, "b": b, "units": table.attrs["units"], "heads": json_rows(table)})
    write_table(screen, table, csv, parquet)
    if not screen.as_json and csv is None and parquet is None:
        _print(screen, table if top is not None else table.head(_MOST), heads)


def _print(screen: Screen, table: DataFrame, heads: int) -> None:
    """Where, and how far apart."""
    units = table.attrs["units"]
    where = [c for c in ("step", "stack", "kind") if table[c].nunique() > 1] + ["layer", "head"]
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in where:
        shown.add_column(name, justify="left" if name in ("stack", "kind") else "right", vertical="top")
    for name, unit in units.items():
        words = "\n".join(name.split("_"))
        shown.add_column(Text(words).append(f"\n{unit}", "dim not bold"), justify="right", no_wrap=True)
    if "edited" in table.columns:
        shown.add_column("edited")
    for row in table.to_dict("records"):
        numbers = ["" if row[name] != row[name] else f"{row[name]:.3f}" for name in units]  # NaN is not equal to itself
        edited = [plain(str(row["edited"]))] if "edited" in table.columns else []
        shown.add_row(*(plain(place_text(c, row[c])) for c in where), *numbers, *edited)
    screen.out.print(shown)
    if len(table) < heads:
        screen.say(f"{len(table)} of {counted(heads, 'head')}; --top {heads} shows all", "dim")
