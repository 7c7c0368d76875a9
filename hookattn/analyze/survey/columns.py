"""Batches of columns, as pipelines of Ray Data or of HF ``datasets`` pass them on: examples in, measured rows out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ... import checks
from ...errors import InputError
from .batches import Value

if TYPE_CHECKING:
    from pyarrow import Table

EXAMPLES = ("text", "input_ids")
"""The columns that examples are in, the first that is there."""


def examples_in(columns: Any) -> tuple[str, list[Value]]:
    """The column that examples are in, and these.

    Args:
        columns: a Table of pyarrow, or columns by name: arrays or lists of one length.

    Raises:
        InputError: there is no such column, or something else in it.
    """
    if not isinstance(columns, Mapping) and not _is_table(columns):
        raise checks.wrong("Measurer", columns, "a batch as columns by name, or as a pyarrow Table")
    names = list(columns) if isinstance(columns, Mapping) else columns.column_names
    name = next((one for one in EXAMPLES if one in names), None)
    if name is None:
        raise InputError(
            f"Measurer: a batch has no column {' or '.join(map(repr, EXAMPLES))}; it has "
            f"{', '.join(map(str, names)) or 'none'}. Rename the column of the examples."
        )
    given = columns[name]
    values = given.to_pylist() if hasattr(given, "to_pylist") else list(given)
    return name, [_example(value, f"Measurer: column {name!r}, row {row}") for row, value in enumerate(values)]


def _example(value: Any, where: str) -> Value:
    plain = value.tolist() if hasattr(value, "tolist") else value
    ids = isinstance(plain, (list, tuple)) and bool(plain) and all(type(i) is int for i in plain)
    if ids:
        return list(plain)
    if isinstance(plain, str) and plain.strip():
        return plain
    raise InputError(f"{where}: expected a text or a list of token ids, got {checks.printed(value)}.")


def measured_rows(columns: Any, name: str, measured: Table, failed: Sequence[tuple[int, str]] | None) -> Any:
    """A batch's rows as they go on: each row of the measured table with what stood beside its example.

    Args:
        columns: the batch.
        name: the column of the examples, which goes no further.
        measured: with ``example`` as the row of the batch; words are decoded, since parts of a data set that are put
            together would each have their own codes.
        failed: rows that could not be measured, with their errors; None: errors have no column.

    Returns:
        A Table for a Table; else numpy arrays by name.

    Raises:
        InputError: a column beside the examples has the name of one that is measured.
    """
    import numpy as np
    import pyarrow as pa

    words = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in measured.schema]
    made = measured.replace_schema_metadata(None).cast(pa.schema(words))
    rows = made["example"]
    made = made.drop_columns(["example"])
    if failed is not None:
        made = made.append_column("error", pa.nulls(made.num_rows, pa.string()))
        lost = pa.table({"error": pa.array([error for _, error in failed], pa.string())})
        made = pa.concat_tables([made, lost], promote_options="default")
        rows = pa.concat_arrays([*rows.chunks, pa.array([row for row, _ in failed], pa.int64())])
    is_mapping = isinstance(columns, Mapping)
    beside = [one for one in (columns if is_mapping else columns.column_names) if one != name]
    if both := sorted(set(beside) & set(made.column_names)):
        raise InputError(f"Measurer: a batch has a column {both[0]!r}, and so has what is measured: rename it.")
    if is_mapping:
        at = rows.to_numpy()
        kept = {one: np.asarray(columns[one])[at] for one in beside}
        return {**kept, **{one: made[one].to_numpy() for one in made.column_names}}
    for place, one in enumerate(beside):
        made = made.add_column(place, columns.schema.field(one), columns[one].take(rows))
    return made


def _is_table(value: Any) -> bool:
    import pyarrow as pa

    return isinstance(value, pa.Table)
