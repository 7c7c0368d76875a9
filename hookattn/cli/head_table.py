"""What commands that show a table of heads have in common: its options, order, first columns, and files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.table import Table
from rich.text import Text

from ..console.screen import Screen, counted, plain
from ..errors import SelectionError, TraceWriteError

if TYPE_CHECKING:
    from pandas import DataFrame

Run = TypeVar("Run", bound=Callable[..., Any])


def check_parquet(parquet: str | None) -> None:
    """Look for what writes Parquet before the work, as pandas asks for it after it.

    Raises:
        ModuleNotFoundError: it is wanted and not installed.
    """
    if parquet is not None:
        import pyarrow  # noqa: F401


def table_options(order: str, most: int | None = None) -> Callable[[Run], Run]:
    """``--sort``, ``--top``, ``--csv`` and ``--parquet``.

    Args:
        order: of the rows, where no other is asked for.
        most: how many of them the terminal shows, likewise; None: all.
    """
    shown = "" if most is None else f"; in the terminal by default {most}"
    options = (
        click.option(
            "--sort", metavar="MEASURE", help=f"The largest first (-MEASURE: the smallest); by default {order}."
        ),
        click.option("--top", type=click.IntRange(min=1), metavar="N", help=f"Only the first N heads{shown}."),
        click.option("--csv", is_flag=False, flag_value="-", metavar="[FILE]", help="Write CSV, to stdout or a file."),
        click.option("--parquet", type=click.Path(), metavar="FILE", help="Write a Parquet file."),
    )
    return partial(reduce, lambda run, option: option(run), options[::-1])


def sorted_by(table: DataFrame, sort: str | None) -> DataFrame:
    """The table, the largest of a measure first; ``-measure``: the smallest; None: as it is.

    Raises:
        SelectionError: it has no such measure; says why, or which it has.
    """
    if sort is None:
        return table
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


def write_table(screen: Screen, table: DataFrame, csv: str | None, parquet: str | None) -> bool:
    """Write a table where it was asked for, ``-``: to stdout; returns whether it was asked for at all.

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
    return csv is not None or parquet is not None


def place_columns(table: DataFrame) -> list[str]:
    """The columns that say where a head is, those left out that are alike in all rows."""
    return [c for c in ("step", "stack", "kind") if table[c].nunique() > 1] + ["layer", "head"]


def started(where: list[str], measures: dict[str, tuple[str, str]]) -> Table:
    """A table for the terminal, with its columns.

    Args:
        where: columns that say where a head is.
        measures: column → its name in lines, and its unit.
    """
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in where:
        made.add_column(name, justify="left" if name in ("stack", "kind") else "right", vertical="top")
    for words, unit in measures.values():
        made.add_column(Text(words).append(f"\n{unit}", "dim not bold"), justify="right", no_wrap=True)
    return made


def cells(row: dict[Any, Any], where: list[str], measures: dict[str, tuple[str, str]], digits: int) -> list[Text]:
    """What stands in these columns of one row; nothing for NaN, and ? for a layer that is not known."""
    numbers = ["" if row[name] != row[name] else f"{row[name]:.{digits}f}" for name in measures]
    return [plain(x) for x in (*(place_text(name, row[name]) for name in where), *numbers)]


def place_text(column: str, value: Any) -> str:
    """Where a head is. A layer that is not known makes its column one of floats."""
    if value is None or value != value:
        return "?"
    return f"{value:.0f}" if column == "layer" else str(value)
