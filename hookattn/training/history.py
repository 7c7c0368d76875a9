"""What was measured so far, as one table: a row for each head and measurement, and its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..store.partial import PartialFile, explaining_os_errors
from .ranks import PLACE

if TYPE_CHECKING:
    from pandas import DataFrame

_WORDS = ("stack", "kind", "path")


class History:
    """The measurements of one training, each step once.

    Args:
        units: of the measures, by their columns.
    """

    def __init__(self, units: dict[str, str]) -> None:
        self._units = units
        self._of_steps: dict[int, DataFrame] = {}

    @property
    def columns(self) -> list[str]:
        """``step``, the place of a head, and the measures."""
        return ["step", *PLACE, *self._units]

    @property
    def steps(self) -> list[int]:
        """The steps that were measured, in their order."""
        return sorted(self._of_steps)

    def add(self, table: DataFrame) -> None:
        """A measurement; one of the same step makes way for it."""
        self._of_steps[int(table["step"].iloc[0])] = table

    def drop_after(self, step: int) -> None:
        """Forget what was measured after a step from which the training goes on."""
        self._of_steps = {n: table for n, table in self._of_steps.items() if n <= step}

    def table(self) -> DataFrame:
        """All of it, in the order of the steps; ``attrs["units"]`` has the units of the measures."""
        import pandas as pd

        from ..analyze.frame import table_of

        parts = [self._of_steps[step] for step in self.steps]
        made = pd.concat(parts, ignore_index=True) if parts else table_of({name: [] for name in self.columns})
        made.attrs["units"] = dict(self._units)
        return made

    def replace(self, table: DataFrame, where: str) -> None:
        """Take a table in place of what there is.

        Raises:
            InputError: it is of other measures, or no history.
        """
        from ..analyze.frame import table_of

        if list(map(str, table.columns)) != self.columns:
            raise InputError(
                f"{where} is no history of this monitor: it has the columns {', '.join(map(str, table.columns))}; "
                f"expected {', '.join(self.columns)}. Choose another name, or the measures it was made with."
            )
        made = table_of({name: table[name].tolist() for name in table.columns})
        self._of_steps = {
            step: made[made["step"] == step].reset_index(drop=True) for step in map(int, made["step"].unique())
        }

    def read(self, path: Path) -> None:
        """Take what a file has in place of what there is.

        Raises:
            InputError: it cannot be read, or is of something else.
        """
        import pandas as pd

        try:
            if path.suffix.lower() == ".csv":
                kinds = dict.fromkeys(_WORDS, str)
                table = pd.read_csv(path, dtype=kinds, float_precision="round_trip")
                table = table.fillna(dict.fromkeys(set(_WORDS) & set(table.columns), ""))  # the path of a model itself
            else:
                table = pd.read_parquet(path)
        except (OSError, ValueError) as error:  # pandas' and pyarrow's own are ValueErrors
            raise InputError(f"{path}: cannot be read as a history of heads: {error}") from error
        self.replace(table, str(path))

    def write(self, path: Path) -> None:
        """Write all of it, as Parquet, or CSV where the name ends so; the file is there whole, or as it was.

        Raises:
            TraceWriteError: it cannot be written.
        """
        import io

        table = self.table()
        if path.suffix.lower() == ".csv":
            data = table.to_csv(index=False).encode()
        else:
            made = io.BytesIO()
            table.to_parquet(made, index=False)
            data = made.getvalue()
        with explaining_os_errors(path, "write the history of heads", len(data)):
            file = PartialFile(path)
            try:
                file.write(0, data)
                file.commit(len(data))
            finally:
                file.discard()

    def to_columns(self) -> dict[str, list[Any]]:
        """As plain data, for a checkpoint."""
        return {str(name): column.tolist() for name, column in self.table().items()}

    def from_columns(self, columns: dict[str, Sequence[Any]]) -> None:
        """What :meth:`to_columns` gave, in place of what there is.

        Raises:
            InputError: it is of other measures.
        """
        import pandas as pd

        self.replace(pd.DataFrame(columns), "the checkpoint's history of heads")


def set_aside(path: Path) -> Path:
    """Give a file of an earlier training another name, under which there is none.

    Returns:
        The name: ``heads.1.parquet`` for ``heads.parquet``.

    Raises:
        TraceWriteError: it cannot be renamed.
    """
    number = 1
    while (other := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    with explaining_os_errors(path, f"rename it to {other.name}"):
        path.rename(other)
    return other
