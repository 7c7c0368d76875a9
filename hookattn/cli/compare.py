"""``hookattn compare``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..analyze import compare
from ..console.screen import Screen, counted, plain
from ..traces import load
from .command import Command
from .head_table import cells, check_parquet, json_rows, place_columns, sorted_by, started, table_options, write_table

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
@table_options("total_variation", _MOST)
@click.option("--stitch", is_flag=True, help="Put the steps of a generation together first, in both.")
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
    check_parquet(parquet)
    one, other = (load(file).stitch() if stitch else load(file) for file in (a, b))
    table = sorted_by(compare(one, other), sort)
    heads = len(table)
    table = table.head(top) if top is not None else table
    if screen.as_json:
        screen.json({"a": a, "b": b, "units": table.attrs["units"], "heads": json_rows(table)})
    if not write_table(screen, table, csv, parquet) and not screen.as_json:
        _print(screen, table if top is not None else table.head(_MOST), heads)


def _print(screen: Screen, table: DataFrame, heads: int) -> None:
    """Where, and how far apart."""
    where = place_columns(table)
    columns = {name: ("\n".join(name.split("_")), unit) for name, unit in table.attrs["units"].items()}
    shown = started(where, columns)
    if "edited" in table.columns:
        shown.add_column("edited")
    for row in table.to_dict("records"):
        edited = [plain(str(row["edited"]))] if "edited" in table.columns else []
        shown.add_row(*cells(row, where, columns, 3), *edited)
    screen.out.print(shown)
    if len(table) < heads:
        screen.say(f"{len(table)} of {counted(heads, 'head')}; --top {heads} shows all", "dim")
