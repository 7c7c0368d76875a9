"""``hookattn heads``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from ..analyze import MEASURES, as_distribution, report
from ..analyze.frame import views
from ..console.screen import Screen, counted, plain
from ..errors import SelectionError, TraceWriteError
from ..printable import printable
from ..traces import load
from .command import Command
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
@click.option(
    "--sort", metavar="MEASURE", help="The largest first (-MEASURE: the smallest); by default in the model's order."
)
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="Only the first N heads.")
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
@click.option("--csv", is_flag=False, flag_value="-", metavar="[FILE]", help="Write CSV, to stdout or a file.")
@click.option("--parquet", type=click.Path(), metavar="FILE", help="Write a Parquet file.")
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
    if parquet is not None:
        import pyarrow  # noqa: F401 - before the work, as pandas asks for it after it
    trace = load(file)
    table = report(trace if field == "weights" else as_distribution(trace, field), measures)
    if sort is not None:
        table = sorted_by(table, sort)
    table = table.head(top) if top is not None else table
    if screen.as_json:
        units, left_out = table.attrs["units"], table.attrs["left_out"]
        screen.json({"file": file, "of": field, "units": units, "left_out": left_out, "heads": json_rows(table)})
    write_table(screen, table, csv, parquet)
    if not screen.as_json and csv is None and parquet is None:
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


def write_table(screen: Screen, table: DataFrame, csv: str | None, parquet: str | None) -> None:
    """Write a table of heads where it was asked for; ``-``: to stdout.

    Raises:
        TraceWriteError: it cannot be written there.
    """
    if csv == "-":
        click.echo(table.to_csv(index=False), nl=False)
    for path, write in ((csv, table.to_csv), (parquet, table.to_parquet)):
        if path is not None and path != "-":
            try:
                write(path, index=False)
            except OSError as error:
                raise TraceWriteError(f"{path}: cannot be written: {error.strerror or error}.") from error
            screen.say(f"wrote {path}: {counted(len(table), 'head')}")


def sorted_by(table: DataFrame, sort: str) -> DataFrame:
    """The table, the largest of a measure first; ``-measure``: the smallest.

    Raises:
        SelectionError: it has no such measure; says why, or which it has.
    """
    key = sort.removeprefix("-")
    if key not in table.attrs["units"]:
        why = table.attrs.get("left_out", {}).get(key)
        said = f"it is not defined here: {why}" if why else f"there are {', '.join(table.attrs['units'])}"
        raise SelectionError(f"--sort {sort}: {said}.")
    return table.sort_values(key, ascending=sort.startswith("-"), kind="stable", na_position="last")


def json_rows(table: DataFrame) -> list[dict[str, Any]]:
    """Rows as plain data; NaN as null."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(key): value for key, value in row.items()} for row in rows]


def _print_heads(screen: Screen, table: DataFrame, measures: list[str], keep: int) -> None:
    """Where, some measures, and the roles with their evidence.

    Args:
        measures: as many of these as leave room for the roles,
        keep: and the first so many in any case.
    """
    where = [c for c in ("step", "stack", "kind") if table[c].nunique() > 1] + ["layer", "head"]
    units = table.attrs["units"]
    heads = {m: [*m.replace("_", " ").split(), units[m]] for m in measures if m in units}
    left = screen.out.width - _ROLES - sum(2 + max(map(len, [c, *map(str, table[c])])) for c in where)
    while len(heads) > keep and sum(2 + max(map(len, words)) for words in heads.values()) > left:
        heads.popitem()
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in where:
        shown.add_column(name, justify="left" if name in ("stack", "kind") else "right", vertical="top")
    for *words, unit in heads.values():
        shown.add_column(Text("\n".join(words)).append(f"\n{unit}", "dim not bold"), justify="right", no_wrap=True)
    shown.add_column(Text("role").append("  and its evidence", "dim not bold"))
    for row in table.to_dict("records"):
        numbers = ["" if row[m] != row[m] else f"{row[m]:.2f}" for m in heads]  # NaN is not equal to itself
        place = [plain(place_text(c, row[c])) for c in where]
        shown.add_row(*place, *numbers, _role_lines(str(row["role"]), str(row["evidence"])))
    screen.out.print(shown)
    _print_left_out(screen, table)


def place_text(column: str, value: Any) -> str:
    """Where a head is. A layer that is not known makes its column one of floats."""
    if value is None or value != value:
        return "?"
    return f"{value:.0f}" if column == "layer" else str(value)


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
