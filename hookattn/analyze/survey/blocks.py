"""Blocks of examples: what a file of any kind is read as, so that examples which nobody wants are only counted."""

from __future__ import annotations

import io
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ...errors import BlankLinesWarning, InputError
from .batches import Value

ROWS = 1024
"""How many examples of lines, or of a stream of rows, are a block."""


class Block(NamedTuple):
    """Neighbouring examples.

    Attributes:
        size: how many there are.
        values: those from one number on up to another; an error stands for one that cannot be read. It is called with
            rising numbers.
    """

    size: int
    values: Callable[[int, int], list[Value | InputError]]


def column_of(names: Sequence[str], field: str | None, where: str) -> str:
    """The column of the examples.

    Raises:
        InputError: there is none; says which there are.
    """
    wanted = ("text", "input_ids") if field is None else (field,)
    for name in wanted:
        if name in names:
            return name
    raise InputError(f"{where}: has no {' or '.join(map(repr, wanted))}; it has {', '.join(names) or 'nothing'}.")


def example(value: Any, where: str) -> Value | InputError:
    """What a file holds, as an example."""
    ids = isinstance(value, list) and bool(value) and all(type(i) is int for i in value)
    if ids or (isinstance(value, str) and value.strip()):
        return value  # type: ignore[no-any-return]
    return InputError(f"{where}: expected a text or a list of token ids, got {str(value)[:60]!r}.")


# --------------------------------------------------------------------------------------------------------------- lines


def lines(file: Any, name: str, read: Callable[[str, str], Value | InputError]) -> Iterator[Block]:
    """The lines of an open binary file that are not empty.

    An example after a blank line gets another number than its line: that is told by a BlankLinesWarning, once a file.

    Args:
        file: closed at the end.
        name: for messages.
        read: an example of a line, and of where it is.
    """

    def values(held: list[tuple[int, str]], start: int, stop: int) -> list[Value | InputError]:
        return [_utf8(line, f"{name}, line {number}", read) for number, line in held[start:stop]]

    # What is no UTF-8 is one example's fault, and found out where that is wanted.
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape") as text:
        numbered = enumerate(text, 1)
        there, told = 0, False
        while some := list(itertools.islice(numbered, ROWS)):
            held = [entry for entry in some if not entry[1].isspace()]
            there += len(held)
            if held and held[-1][0] > there and not told:
                told = True
                warnings.warn(
                    f"{name}: blank lines are no examples and are not counted, so that the numbers of its examples "
                    "are not those of its lines; give the examples an id of your own to join on.",
                    BlankLinesWarning,
                    stacklevel=2,
                )
            if held:
                yield Block(len(held), lambda start, stop, held=held: values(held, start, stop))  # type: ignore[misc]


def _utf8(line: str, where: str, read: Callable[[str, str], Value | InputError]) -> Value | InputError:
    try:
        line.encode()
    except UnicodeEncodeError:
        return InputError(f"{where}: cannot be read as UTF-8 text.")
    return read(line.rstrip("\r\n"), where)


def json_line(field: str | None) -> Callable[[str, str], Value | InputError]:
    """What reads a line of JSON: an object with the field, or a bare value."""

    def read(line: str, where: str) -> Value | InputError:
        try:
            value = json.loads(line)
        except ValueError as error:
            return InputError(f"{where}: is no JSON: {error}.")
        if isinstance(value, dict):
            try:
                value = value[column_of(list(value), field, where)]
            except InputError as error:
                return error
        return example(value, where)

    return read


# ------------------------------------------------------------------------------------------------------------- columns


def parquet(file: Any, name: str, field: str | None) -> Iterator[Block]:
    """The row groups of an open Parquet file; one that nobody asks for is not read.

    Raises:
        InputError: pyarrow is missing; there is no such column; it cannot be read.
    """
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise InputError(f'{name}: Parquet needs the package pyarrow: pip install "hookattn[analyze]"') from error
    try:
        with pq.ParquetFile(file) as found:
            column, row = column_of(found.schema_arrow.names, field, name), 0
            for group in range(found.num_row_groups):
                size = found.metadata.row_group(group).num_rows
                yield Block(size, _RowGroup(found, group, column, name, row).values)
                row += size
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise InputError(f"{name}: cannot be read as Parquet: {error}") from error


class _RowGroup:
    """Rows in batches, so that a group larger than the memory is read like any other."""

    def __init__(self, file: Any, group: int, column: str, name: str, row: int) -> None:
        self.file, self.group, self.column, self.name, self.row = file, group, column, name, row
        self._batches: Iterator[Any] | None = None
        self._begin, self._batch = 0, None  # the number of the first row of the batch at hand, and that batch

    def values(self, start: int, stop: int) -> list[Value | InputError]:
        """As :class:`Block` has it."""
        made: list[Any] = []
        try:
            if self._batches is None:
                self._batches = self.file.iter_batches(ROWS, row_groups=[self.group], columns=[self.column])
            while start < stop:
                while self._batch is None or start >= self._begin + len(self._batch):
                    self._begin += 0 if self._batch is None else len(self._batch)
                    self._batch = next(self._batches).column(0)
                own = self._batch.slice(start - self._begin, stop - start).to_pylist()
                made += [example(v, f"{self.name}, row {self.row + n}") for n, v in enumerate(own, start)]
                start += len(own)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.name}: cannot be read as Parquet: {error}") from error
        return made


def table_rows(rows: Any, name: str, field: str | None) -> Iterator[Block]:
    """A dataset of the package ``datasets`` that can be asked for any row."""
    column = column_of(rows.column_names, field, name)

    def values(begin: int, start: int, stop: int) -> list[Value | InputError]:
        found = rows[begin + start : begin + stop][column]
        return [example(v, f"{name}, row {n}") for n, v in enumerate(found, begin + start)]

    for begin in range(0, len(rows), ROWS):
        size = min(ROWS, len(rows) - begin)
        yield Block(size, lambda start, stop, begin=begin: values(begin, start, stop))  # type: ignore[misc]


def streamed_rows(rows: Any, name: str, field: str | None) -> Iterator[Block]:
    """A dataset of the package ``datasets`` that comes row after row."""
    numbered = enumerate(rows)

    def values(held: list[tuple[int, Any]], start: int, stop: int) -> list[Value | InputError]:
        return [
            example(row[column_of(list(row), field, f"{name}, row {number}")], f"{name}, row {number}")
            for number, row in held[start:stop]
        ]

    while held := list(itertools.islice(numbered, ROWS)):
        yield Block(len(held), lambda start, stop, held=held: values(held, start, stop))  # type: ignore[misc]
