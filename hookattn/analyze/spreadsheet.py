"""The tables of this package as pandas classes that write, for spreadsheets, text as text.

A spreadsheet computes a cell that begins with ``=``, ``+``, ``-`` or ``@``, and paths and tokens are whatever a file or
a model calls them. In what :meth:`Table.to_csv`, ``to_excel`` and ``to_clipboard`` write, such a text begins with an
apostrophe, and is no formula. Numbers are written as numbers, and in all other forms (Parquet, JSON, the table itself)
the text stays as it is. ``docs/analyze.md`` says how it is read back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pandas as pd

from ..printable import printable

# Where a cell begins: at the start, and behind a semicolon, which is the separator of spreadsheets that have a comma in
# their numbers. Spaces and quotes before the sign are skipped, as spreadsheets do; full-width signs are signs to them.
_COMPUTED = re.compile(r"""(^|;)(?=[\s'"]*[=+\-@\t＝＋－＠])""")


def as_text(cell: Any) -> Any:
    """A text that a spreadsheet takes for a text; anything else as it is."""
    return _COMPUTED.sub(r"\1'", printable(cell, keep="\n\t")) if isinstance(cell, str) else cell


def _with_text(frame: pd.DataFrame) -> pd.DataFrame:
    """A plain DataFrame with the same cells and labels, text as spreadsheets take it for text."""
    made = pd.DataFrame(frame)
    for place in range(made.shape[1]):
        column = made.iloc[:, place]
        if not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_datetime64_any_dtype(column)):
            made.isetitem(place, column.astype(object).map(as_text).array)
    made.index, made.columns = _with_text_labels(made.index), _with_text_labels(made.columns)
    return made


def _with_text_labels(labels: pd.Index[Any]) -> pd.Index[Any]:
    if pd.api.types.is_numeric_dtype(labels):
        return labels
    if isinstance(labels, pd.MultiIndex):
        return labels.map(lambda several: tuple(map(as_text, several)))
    return labels.map(as_text)


class Column(pd.Series):  # type: ignore[type-arg,misc,unused-ignore]
    """A column of a :class:`Table`."""

    @property
    def _constructor(self) -> Callable[..., Column]:
        return Column

    @property
    def _constructor_expanddim(self) -> Callable[..., Table]:
        return Table

    def to_csv(self, *args: Any, **options: Any) -> Any:  # type: ignore[override,unused-ignore]
        """As pandas has it; text that a spreadsheet would compute begins with an apostrophe."""
        return self.to_frame().to_csv(*args, **options)

    def to_excel(self, *args: Any, **options: Any) -> Any:  # type: ignore[misc,override,unused-ignore]
        """As pandas has it; text that a spreadsheet would compute begins with an apostrophe."""
        return self.to_frame().to_excel(*args, **options)

    def to_clipboard(self, *args: Any, **options: Any) -> Any:  # type: ignore[misc,override,unused-ignore]
        """As pandas has it; text that a spreadsheet would compute begins with an apostrophe."""
        return self.to_frame().to_clipboard(*args, **options)


class Table(pd.DataFrame):
    """A DataFrame like any other, but for what it writes for spreadsheets; see the module."""

    @property
    def _constructor(self) -> Callable[..., Table]:
        return Table

    @property
    def _constructor_sliced(self) -> Callable[..., Column]:
        return Column

    def to_csv(self, *args: Any, **options: Any) -> Any:  # type: ignore[override,unused-ignore]
        """As pandas has it; text that a spreadsheet would compute begins with an apostrophe."""
        return _with_text(self).to_csv(*args, **options)

    def to_excel(self, *args: Any, **options: Any) -> Any:  # type: ignore[misc,override,unused-ignore]
        """As pandas has it; text that a spreadsheet would compute begins with an apostrophe."""
        return _with_text(self).to_excel(*args, **options)

    def to_clipboard(self, *args: Any, **options: Any) -> Any:  # type: ignore[misc,override,unused-ignore]
        """As pandas has it; text that a spreadsheet would compute begins with an apostrophe."""
        return _with_text(self).to_clipboard(*args, **options)
