"""What of a survey is done: a part on the disk for each batch, put together into one file at the end.

A part is written under a temporary name and renamed, so that whatever ends a survey, its parts are whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import MeasureError, TraceWriteError
from ...store.partial import partial_name, remove_leftovers

if TYPE_CHECKING:
    from pandas import DataFrame
    from pyarrow import Table

_KEY = b"hookattn_survey"


class Parts:
    """The parts of one table.

    Args:
        out: the table's file; its parts are in a directory beside it until it is complete.
        about: what the survey is of, as plain data; a survey goes on only where this is the same.
        what: the word for what goes on here, for messages.

    Attributes:
        complete: whether the table is there.
        done: how many parts there are, from the first on up to the first that is missing.

    Raises:
        MeasureError: ``out``, or its parts, are of another survey.
        TraceWriteError: the directory cannot be made.
    """

    def __init__(self, out: str | os.PathLike[str], about: Mapping[str, Any], what: str = "survey") -> None:
        self.out, self._what = Path(out), what
        self.folder = self.out.with_name(self.out.name + ".parts")
        self.about = json.loads(json.dumps(about))
        self.complete = False
        self.done = 0
        self._is_csv = self.out.suffix.lower() == ".csv"
        self._read: DataFrame | None = None
        remove_leftovers(self.out)
        if self.out.exists():
            self._check(_survey_of_file(self.out), self.out)
            self.complete = True
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        file = self.folder / "survey.json"
        if file.exists():
            self._check(json.loads(file.read_text(encoding="utf-8")), self.folder)
            # Parts are written in order, so that the first one missing is where to go on; a later one would be foreign.
            while self._part(self.done).exists():
                self.done += 1
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # What the survey is of is written before any part, so that no part can be taken for another survey's.
            new = file.with_suffix(".partial")
            new.write_text(json.dumps(self.about), encoding="utf-8")
            new.replace(file)
        except OSError as error:
            raise TraceWriteError(f"{self.folder}: cannot be written: {error.strerror or error}.") from error

    def _check(self, found: Any, where: Path) -> None:
        if found == self.about:
            return
        other = [k for k in self.about if not isinstance(found, dict) or found.get(k) != self.about[k]]
        raise MeasureError(
            f"{where} is of another {self._what} (other {', '.join(other) or 'contents'}): remove it, or choose "
            "another name."
        )

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:08d}.parquet"

    def write(self, table: Table) -> None:
        """The next part.

        Raises:
            TraceWriteError: it cannot be written.
        """
        import pyarrow.parquet as pq

        path = self._part(self.done)
        try:
            pq.write_table(table, path.with_suffix(".partial"), compression="zstd")
            path.with_suffix(".partial").replace(path)
            self.done += 1
        except OSError as error:
            raise TraceWriteError(f"{path}: cannot be written: {error.strerror or error}.") from error

    def finish(self) -> None:
        """Put the parts together, one at a time, and remove them. A file that ends in ``.csv`` is CSV, which does not
        say what it is of; else it is Parquet.

        Raises:
            TraceWriteError: the table cannot be written; the parts stay.
            MeasureError: there is no part.
        """
        import pyarrow.parquet as pq

        if not self.done:
            raise MeasureError("there was nothing to survey: no example was found.")
        new = partial_name(self.out)
        # What is read is read before: that a part cannot be read must not be told as the table's fault.
        write: Callable[[], Any]
        if self._is_csv:
            self._read = table = self.table()
            write = partial(table.to_csv, new, index=False)
        else:
            write = partial(self._write_parquet, new, pq.read_schema(self._part(0)))
        try:
            write()
            new.replace(self.out)
        except OSError as error:
            raise TraceWriteError(f"{self.out}: cannot be written: {error.strerror or error}.") from error
        finally:
            new.unlink(missing_ok=True)
        # Only now: killed in between, the table is there and whole, and the next run removes the parts.
        shutil.rmtree(self.folder, ignore_errors=True)
        self.complete = True

    def _write_parquet(self, new: Path, schema: Any) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = schema.with_metadata({**(schema.metadata or {}), _KEY: json.dumps(self.about).encode()})
        with pq.ParquetWriter(new, schema, compression="zstd") as writer:
            held: list[pa.Table] = []
            for number in range(self.done):
                held.append(pq.read_table(self._part(number)))
                if sum(t.num_rows for t in held) >= 1 << 18:  # few, large row groups, which readers like
                    writer.write_table(pa.concat_tables(held).cast(schema))
                    held = []
            if held:
                writer.write_table(pa.concat_tables(held).cast(schema))

    def table(self) -> DataFrame:
        """All that is done, which has to have room in memory."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from ..frame import table_of

        if self._read is not None:
            return self._read
        several = [self.out] if self.complete else [self._part(number) for number in range(self.done)]
        return table_of(pa.concat_tables(pq.read_table(path) for path in several).to_pydict())


def _survey_of_file(path: Path) -> Any:
    import pyarrow.parquet as pq

    try:
        found = (pq.read_schema(path).metadata or {}).get(_KEY)
        return None if found is None else json.loads(found)
    except (OSError, ValueError):
        return None
