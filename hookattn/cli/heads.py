"""``hookattn heads``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.text import Text

from ..analyze import MEASURES, as_distribution, report
from ..analyze.frame import views
from ..console.screen import Screen, counted
from ..printable import printable
from ..traces import load
from .command import Command
from .head_table import cells, check_parquet, json_rows, place_columns, sorted_by, started, table_options, write_table
from .options import names

if TYPE_CHECKING:
    from pandas import DataFrame

SHOWN = ("entropy", "mean_distance", "first_token", "previous_token", "induction")
"""The measures that are shown where none is asked for and there is room; the files have all."""
_ROLES = 52
"""Columns of the terminal that roles get at least."""


@click.command(
    "heads",
    cls=Command,
    short_help="Show what each head of a trace does.",
    examples=(
        "hookattn heads run.safetensors",
        "hookattn heads run.safetensors --sort induction --top 10",
        "hookattn heads run.safetensors --measures entropy,confidence,sink",
        "hookattn heads run.safetensors --of applied",
        "hookattn heads run.safetensors --csv heads.csv",
        "hookattn heads run.safetensors --json | jq '.heads[] | select(.role != \"\")'",
    ),
)
@click.argument("file", type=click.Path())
@table_options("in the model's order")
@click.option(
    "--of",
    "field",
    type=click.Choice(["weights", "applied"]),
    default="weights",
    show_default=True,
    help="What is measured: the weights as the softmax made them, or what met the values, the magnitude of each over "
    "the sum of its row.",
)
@click.option("--measures", callback=names, metavar="NAME,…", help=f"Of {', '.join(MEASURES)}.")
@click.pass_obj
def command(
    screen: Screen,
    file: str,
    sort: str | None,
    top: int | None,
    field: str,
    measures: tuple[str, ...] | None,
    csv: str | None,
    parquet: str | None,
) -> None:
    """Show all heads of a trace FILE with their scores, and what a head is called where the evidence is clear."""
    check_parquet(parquet)
    trace = load(file)
    table = report(trace if field == "weights" else as_distribution(trace, field), measures)
    table = sorted_by(table, sort)
    table = table.head(top) if top is not None else table
    if screen.as_json:
        units, left_out = table.attrs["units"], table.attrs["left_out"]
        screen.json({"file": file, "of": field, "units": units, "left_out": left_out, "heads": json_rows(table)})
    if not write_table(screen, table, csv, parquet) and not screen.as_json:
        asked = [*(measures or ()), *([sort.removeprefix("-")] if sort is not None else [])]
        _print_heads(screen, table, asked or list(SHOWN), keep=len(asked))
        no_shares = [view for view in views(trace) if field == "weights" and view.no_distribution is not None]
        if no_shares:
            names = ", ".join(dict.fromkeys(view.call.normalizer for view in no_shares))
            screen.say(
                f"no shares in {counted(len(no_shares), 'call')} (normalizer {names}), whose weights are no "
                "distribution over the keys: --of applied measures their magnitudes, made to sum to 1",
                "dim",
            )
        changed = sum(call.fields.get("applied") is not None for call in trace)
        if changed:
            other = "applied" if field == "weights" else "weights"
            screen.say(
                f"of `{field}`; {counted(changed, 'call')} changed the weights after the softmax: --of {other} "
                "measures the others",
                "dim",
            )


def _print_heads(screen: Screen, table: DataFrame, measures: list[str], keep: int) -> None:
    """Where, some measures, and the roles with their evidence.

    Args:
        measures: as many of these as leave room for the roles,
        keep: and the first so many in any case.
    """
    where = place_columns(table)
    units = table.attrs["units"]
    columns = {m: ("\n".join(m.split("_")), units[m]) for m in measures if m in units}
    left = screen.out.width - _ROLES - sum(2 + max(map(len, [c, *map(str, table[c])])) for c in where)
    while len(columns) > keep and sum(2 + _width(*column) for column in columns.values()) > left:
        columns.popitem()
    shown = started(where, columns)
    shown.add_column(Text("role").append("  and its evidence", "dim not bold"))
    for row in table.to_dict("records"):
        shown.add_row(*cells(row, where, columns, 2), _role_lines(str(row["role"]), str(row["evidence"])))
    screen.out.print(shown)
    _print_left_out(screen, table)


def _width(words: str, unit: str) -> int:
    """Of a column, in characters."""
    return max(map(len, [*words.split("\n"), unit]))


def _print_left_out(screen: Screen, table: DataFrame) -> None:
    """Which measures are not there, one line for each reason."""
    reasons: dict[str, list[str]] = {}
    for key, why in table.attrs["left_out"].items():
        reasons.setdefault(why, []).append(key)
    for why, keys in reasons.items():
        screen.say(f"left out {', '.join(keys)}: {why}", "dim")


def _role_lines(roles: str, evidence: str) -> Text:
    """A line for each role."""
    made = Text()
    for role, why in zip(roles.split("; "), evidence.split("; "), strict=True):
        made.append("\n" if made else "").append(printable(role), "green").append(f"  {printable(why)}", "dim")
    return made
