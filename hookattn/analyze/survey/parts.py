"""What of a survey is done: a part for each chunk, in a folder that processes may share, put together at the end.

A part is written under a temporary name and renamed, so that whatever ends a process, the parts are whole; two
processes that make the same part write the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import MeasureError, TraceWriteError
from ...store.partial import remove_leftovers
from .folders import Folder, temporary_name
from .measurer import Failure, failures_of, made_by

if TYPE_CHECKING:
    from pandas import DataFrame
    from pyarrow import Schema, Table

_KEY = b"hookattn_survey"
_ABOUT = "survey.json"
_PART = re.compile(r"(\d{8,})\.parquet")
# What is found out as a survey runs, and does not tell it from another one.
_FOUND = ("parts", "failed", "made_by")
_ROWS = 1 << 18  # of a row group: few, large ones, which readers like


class Parts:
    """The parts of one table. Their numbers are those of the chunks, from 0.

    Args:
        out: the table's file; its parts are in a folder beside it until it is complete.
        about: what the survey is of, as plain data; a survey goes on only where this is the same.
        what: the word for what goes on here, for messages.

    Attributes:
        complete: whether the table is there.
        count: how many parts there are in all; None: nobody has counted yet.
        failures: the examples that could not be measured, once the table is there.

    Raises:
        MeasureError: ``out``, or its parts, are of another survey.
        TraceWriteError: the folder cannot be made.
    """

    def __init__(self, out: str | os.PathLike[str], about: Mapping[str, Any], what: str = "survey") -> None:
        self.out, self._what = Path(out), what
        self.folder = Folder(self.out.with_name(self.out.name + ".parts"))
        self.about = json.loads(json.dumps(about))
        self.complete = False
        self.count: int | None = None
        self.failures: list[Failure] = []
        self._read: DataFrame | None = None
        remove_leftovers(self.out)
        if self._is_finished():
            self.folder.remove()
            return
        try:
            self.folder.make()
            # What the survey is of is written before any part, so that no part can be taken for another survey's.
            if self.folder.read(_ABOUT) is None:
                self.folder.create(_ABOUT, json.dumps(self.about).encode())
            found = json.loads(self.folder.read(_ABOUT) or b"null")
        except OSError as error:
            raise self._unwritten(self.folder, error) from error
        self._check(found, self.folder)
        self.count = found.get("parts")

    def _is_finished(self) -> bool:
        if not self.out.exists():
            return False
        found = _survey_of_file(self.out)
        self._check(found, self.out)
        self.complete, self.count = True, found.get("parts")
        return True

    def _check(self, found: Any, where: object) -> None:
        plain = {k: v for k, v in found.items() if k not in _FOUND} if isinstance(found, dict) else None
        if plain == self.about:
            return
        other = [k for k in self.about if plain is None or plain.get(k) != self.about[k]]
        raise MeasureError(
            f"{where} is of another {self._what} (other {', '.join(other) or 'contents'}): remove it, or choose "
            "another name."
        )

    def _unwritten(self, where: object, error: OSError) -> TraceWriteError:
        return TraceWriteError(
            f"{where}: cannot be written: {error.strerror or error}. The parts that are there stay: the same "
            f"{self._what} goes on from them."
        )

    # ------------------------------------------------------------------------------------------------ what is there

    def present(self) -> set[int]:
        """The numbers of the parts that are there, whoever wrote them."""
        return {int(found[1]) for name in self.folder.names() if (found := _PART.fullmatch(name))}

    @property
    def done(self) -> int:
        """How many parts there are, from the first on up to the first that is missing."""
        there, number = self.present(), 0
        while number in there:
            number += 1
        return number

    def missing(self, count: int) -> list[int]:
        """The numbers of the parts, of so many, that are not there."""
        return sorted(set(range(count)) - self.present())

    def counted(self, count: int) -> None:
        """Keep how many parts there are in all, for those who come later.

        Raises:
            MeasureError: somebody else counted otherwise: the corpus has changed.
            TraceWriteError: it cannot be written.
        """
        if self.count is not None and self.count != count:
            raise MeasureError(f"{self.folder}: there were {self.count} chunks of examples, and now there are {count}.")
        if self.count is None and not self.complete:
            self.count = count
            self._write(_ABOUT, json.dumps({**self.about, "parts": count}).encode())

    # ------------------------------------------------------------------------------------------------------ writing

    def write(self, number: int, table: Table) -> None:
        """One part.

        Raises:
            TraceWriteError: it cannot be written; the others stay.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self._write(_named(number), memoryview(sink.getvalue()))

    def _write(self, name: str, data: bytes | memoryview) -> None:
        try:
            self.folder.write(name, data)
        except OSError as error:
            # Another process that found all parts there has made the table, and removed the folder.
            if not self.complete and not (isinstance(error, FileNotFoundError) and self._is_finished()):
                raise self._unwritten(f"{self.folder}{os.sep}{name}", error) from error

    def finish(self, count: int) -> None:
        """Put the parts together, one at a time, and remove them. A file that ends in ``.csv`` is CSV, which does not
        say what it is of; else it is Parquet.

        Args:
            count: how many parts there are in all.

        Raises:
            TraceWriteError: the table cannot be written; the parts stay.
            MeasureError: there is no part; parts are missing, or cannot be read; not one example could be measured.
        """
        if self.complete:
            return
        if not count:
            raise MeasureError("there was nothing to survey: no example was found.")
        if lost := self.missing(count):
            raise MeasureError(
                f"{self.folder}: {len(lost)} of {count} parts are missing: {ranges(lost)}. No table was written."
            )
        if foreign := sorted(self.present() - set(range(count))):
            raise MeasureError(
                f"{self.folder}: of {count} parts, there are {ranges(foreign)} too: the examples have become fewer."
            )
        found, schema = self._seen(count)
        new = self.folder.path / temporary_name("table")
        # What is read is read before: that a part cannot be read must not be told as the table's fault.
        if self.out.suffix.lower() == ".csv":
            self._read = self.table()
        try:
            if self._read is not None:
                self._read.to_csv(new, index=False)
            else:
                self._write_parquet(new, schema.with_metadata({_KEY: json.dumps(found).encode()}), count)
            self._write_failures()
            os.replace(new, self.out)
        except OSError as error:
            if not (isinstance(error, FileNotFoundError) and self._is_finished()):
                raise self._unwritten(self.out, error) from error
        finally:
            new.unlink(missing_ok=True)
        # Only now: killed in between, the table is there and whole, and the next run removes the parts.
        self.folder.remove()
        self.complete, self.count = True, count

    def _seen(self, count: int) -> tuple[dict[str, Any], Schema]:
        """What the table says of itself, of the last lines of all parts; and its columns."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows, makers, schema, failures = 0, dict[str, list[int]](), None, list[Failure]()
        for number in range(count):
            try:
                with pq.ParquetFile(self._source(number)) as file:
                    rows += file.metadata.num_rows
                    own = file.schema_arrow
            except (OSError, pa.ArrowException) as error:
                raise self._unread(number, error) from error
            failures += failures_of(own)
            if (maker := made_by(own)) is not None:
                makers.setdefault(json.dumps(maker), []).append(number)
            schema = schema or own
        if failures and not rows:
            raise MeasureError(
                f"none of {len(failures)} examples could be measured; the first one: {failures[0].error} No table was "
                f"written. Remove {self.folder} before another try."
            )
        self.failures = failures
        found = {**self.about, "parts": count}
        if failures:
            found["failed"] = len(failures)
        if makers:
            # Which parts: only where there are several makers, whose last bits may differ.
            several = len(makers) > 1
            found["made_by"] = [
                {**json.loads(maker), **({"parts": ranges(numbers)} if several else {})}
                for maker, numbers in sorted(makers.items(), key=lambda entry: entry[1][0])
            ]
        assert schema is not None
        return found, schema

    def _source(self, number: int) -> Any:
        import pyarrow as pa

        data = self.folder.read(_named(number))
        if data is None:
            raise FileNotFoundError(f"part {number} is gone")
        return pa.BufferReader(data)

    def _part(self, number: int) -> Table:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_table(self._source(number))
        except (OSError, pa.ArrowException) as error:
            raise self._unread(number, error) from error

    def _unread(self, number: int, error: Exception) -> MeasureError:
        return MeasureError(
            f"{self.folder}{os.sep}{_named(number)}: cannot be read: {error}. Remove it, and run the same "
            f"{self._what} again."
        )

    def _write_parquet(self, new: Path, schema: Schema, count: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetWriter(new, schema, compression="zstd") as writer:
            held: list[Table] = []
            for number in range(count):
                held.append(self._part(number).cast(schema))
                if sum(t.num_rows for t in held) >= _ROWS:
                    writer.write_table(pa.concat_tables(held))
                    held = []
            if held:
                writer.write_table(pa.concat_tables(held))

    def _write_failures(self) -> None:
        beside = failed_beside(self.out)
        if not self.failures:
            beside.unlink(missing_ok=True)  # of an earlier survey of this name
            return
        new = self.folder.path / temporary_name("failed")
        lines = [json.dumps({"example": f.example, "error": f.error}, ensure_ascii=False) for f in self.failures]
        new.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(new, beside)

    def table(self) -> DataFrame:
        """All that is done, which has to have room in memory."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from ..frame import table_of

        if self._read is not None:
            return self._read
        several = [pq.read_table(self.out)] if self.complete else [self._part(n) for n in sorted(self.present())]
        return table_of(pa.concat_tables(several).to_pydict())


def recorded(out: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What the table at ``out``, or its parts, say they are of; None: there is nothing."""
    path = Path(out)
    if path.exists():
        found = _survey_of_file(path) or {}
    else:
        found = json.loads(Folder(path.with_name(path.name + ".parts")).read(_ABOUT) or b"null")
    return found if found is None or isinstance(found, dict) else {}


def failed_beside(out: str | os.PathLike[str]) -> Path:
    """The file that lists the examples of a table that could not be measured."""
    return Path(out).with_name(Path(out).name + ".failed.jsonl")


def _named(number: int) -> str:
    return f"{number:08d}.parquet"


def ranges(numbers: Iterable[int], most: int = 8) -> str:
    """Sorted numbers as a text: ``0-3, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:most]]
    return ", ".join(shown) + (f" and {len(runs) - most} more runs" if len(runs) > most else "")


def _survey_of_file(path: Path) -> Any:
    import pyarrow.parquet as pq

    try:
        found = (pq.read_schema(path).metadata or {}).get(_KEY)
        return None if found is None else json.loads(found)
    except (OSError, ValueError):
        return None
