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

from ... import checks
from ...errors import InputError, MeasureError, TraceWriteError
from ...store.partial import remove_leftovers
from .folders import DiskFolder, folder_and_name, inside
from .measurer import Failure, failures_of, made_by, sentence

if TYPE_CHECKING:
    from pandas import DataFrame
    from pyarrow import Schema, Table

_KEY = b"hookattn_survey"
_PART = re.compile(r"(\d{8,})\.parquet")
# Readers of a directory of Parquet files pass over names that begin so.
_ABOUT, _ABOUT_DATASET, _FAILED = "survey.json", "_survey.json", "_failed.jsonl"
FOUND = "found"
"""The key of what is found out as a survey runs, and is no setting of it: ``model``, ``parts``, ``shards``, ``failed``,
``made_by``, ``finished``."""
_ROWS = 1 << 16  # of a row group: large enough for readers, and of no account in memory


class Parts:
    """The parts of one table. Their numbers are those of the chunks, from 0.

    Args:
        out: the table: a file, whose parts are in a folder beside it until it is complete; or, if it ends in ``/``, a
            directory that has the parts as a Parquet dataset. On a disk it gets its name when all are there; in a store
            (``s3://…``) it is complete once its ``_survey.json`` says ``finished``.
        about: what the survey is of, as plain data; a survey goes on only where this is the same.
        what: the word for what goes on here, for messages.
        begin: whether to begin where nobody has.

    Attributes:
        complete: whether the table is there.
        count: how many parts there are in all; None: nobody has counted yet.
        failures: the examples that could not be measured, once the table is there.

    Raises:
        MeasureError: ``out``, or its parts, are of another survey.
        TraceWriteError: the folder cannot be made.
    """

    def __init__(
        self, out: str | os.PathLike[str], about: Mapping[str, Any], what: str = "survey", *, begin: bool = True
    ) -> None:
        self.out, self._what = os.fspath(out), what
        self._parent, self._name = folder_and_name(self.out)
        self.is_dataset = self.out.endswith(("/", os.sep))
        self._in_place = self.is_dataset and not isinstance(self._parent, DiskFolder)
        self.folder = inside(self._parent, self._name if self._in_place else f"{self._name}.parts")
        self._about = _ABOUT_DATASET if self.is_dataset else _ABOUT
        self.about = json.loads(json.dumps(about))
        self.complete = False
        self.failures: list[Failure] = []
        self._found: dict[str, Any] = {}
        self._read: DataFrame | None = None
        if isinstance(self._parent, DiskFolder) and not self.is_dataset:
            remove_leftovers(Path(self.out))
        try:
            if self._is_finished():
                if not self._in_place:
                    self.folder.remove()
                return
            if not begin and self.folder.read(self._about) is None:
                raise MeasureError(f"{self.folder}: there are no parts of a {what} here.")
            self.folder.make()
            # What the survey is of is written before any part, so that no part can be taken for another survey's.
            self.folder.create(self._about, json.dumps(self.about).encode())
            found = json.loads(self.folder.read(self._about) or b"null")
        except OSError as error:
            raise self._unwritten(str(self.folder), error) from error
        self._check(found, str(self.folder))

    @property
    def count(self) -> int | None:
        """How many parts there are in all; None: nobody has counted yet."""
        return self._found.get("parts")

    def _is_finished(self) -> bool:
        found = finished(self.out)
        if found is None:
            return False
        self._check(found, self.out)
        self.complete = True
        self.failures = failures_listed(self.out)
        return True

    def _check(self, found: Any, where: str) -> None:
        plain = {k: v for k, v in found.items() if k != FOUND} if isinstance(found, dict) else None
        if plain == self.about:
            self._found = found.get(FOUND, {})
            return
        other = [k for k in self.about if plain is None or plain.get(k) != self.about[k]]
        raise self._foreign(where, ", ".join(other) or "contents")

    def _foreign(self, where: str, other: str) -> MeasureError:
        return MeasureError(f"{where} is of another {self._what} (other {other}): remove it, or choose another name.")

    def _unwritten(self, where: str, error: OSError) -> TraceWriteError:
        return TraceWriteError(
            f"{where}: cannot be written: {error.strerror or error}. The parts that are there stay: the same "
            f"{self._what} goes on from them."
        )

    # ------------------------------------------------------------------------------------------------ what is there

    def present(self) -> set[int]:
        """The numbers of the parts that are there, whoever wrote them.

        Raises:
            TraceWriteError: the folder cannot be read.
        """
        try:
            return {int(found[1]) for name in self.folder.names() if (found := _PART.fullmatch(name))}
        except OSError as error:
            raise self._unwritten(str(self.folder), error) from error

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

    def has_rows(self) -> bool:
        """Whether some part has a row: some example could be measured."""
        return self.complete or any(self._metadata(number)[0] for number in sorted(self.present()))

    def counted(self, count: int) -> None:
        """Keep how many parts there are in all, for those who come later.

        Raises:
            MeasureError: somebody else counted otherwise.
            TraceWriteError: it cannot be written.
        """
        if self._keep("parts", count) != count:
            raise MeasureError(
                f"{self.folder}: there were {self.count} chunks of examples, and now there are {count}: other examples."
            )

    def of_model(self, name: str) -> None:
        """Keep the class of the model.

        Raises:
            MeasureError: the survey is of another one.
            TraceWriteError: it cannot be written.
        """
        if self._keep("model", name) != name:
            raise self._foreign(self.out if self.complete else str(self.folder), "model")

    def shared_by(self, count: int) -> None:
        """Keep how many shards there are, so that what is missing can be named by its shard.

        Raises:
            TraceWriteError: it cannot be written.
        """
        if count > 1:
            self._keep("shards", count)

    def _keep(self, key: str, value: Any) -> Any:
        """Write down what was found out, unless it is known; what is known then."""
        if not self.complete and key not in self._found:
            found = json.loads(self.folder.read(self._about) or b"null")
            # Others may have written since; what each of them knows is the same.
            self._found |= (found or {}).get(FOUND, {})
            if key not in self._found:
                self._found[key] = value
                self._write(self._about, json.dumps({**self.about, FOUND: self._found}).encode())
        return self._found.get(key)

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
            if not self._is_gone(error):
                raise self._unwritten(self.folder.file(name), error) from error

    def _is_gone(self, error: OSError) -> bool:
        """Whether another process, which found all parts there, has made the table and removed the folder."""
        return self.complete or (isinstance(error, FileNotFoundError) and self._is_finished())

    def finish(self, count: int, *, strict: bool = False) -> None:
        """Put the parts together, one at a time, and remove them. A file that ends in ``.csv`` is CSV, which does not
        say what it is of; else it is Parquet.

        Args:
            count: how many parts there are in all.
            strict: an example that could not be measured is an error.

        Raises:
            TraceWriteError: the table cannot be written; the parts stay.
            MeasureError: there is no part; parts are missing, or cannot be read; not one example could be measured.
            InputError: ``strict``.
        """
        if not count:
            raise MeasureError("there was nothing to survey: no example was found.")
        if not self.complete:
            self._check_all_there(count)
            found, schema = self._summed_up(count)
            if strict and self.failures:
                raise _strict(self.failures)
            try:
                if self.is_dataset:
                    self._finish_dataset(found)
                else:
                    self._finish_file(found, schema, count)
            except OSError as error:
                if not self._is_gone(error):
                    raise self._unwritten(self.out, error) from error
            self.complete = True
        if strict and self.failures:
            raise _strict(self.failures)

    def _check_all_there(self, count: int) -> None:
        if lost := self.missing(count):
            of = self._found.get("shards")
            shards = sorted({number % of for number in lost}) if of else []
            mend = f" Run {', '.join(f'shard {i}/{of}' for i in shards[:20])}" if shards else " Run the others"
            raise MeasureError(
                f"{self.folder}: {len(lost)} of {count} parts are missing: {ranges(lost)}. No table was written."
                f"{mend}{' and more' if len(shards) > 20 else ''} again."
            )
        if foreign := sorted(self.present() - set(range(count))):
            raise MeasureError(
                f"{self.folder}: there are {count} chunks of examples, and a part {ranges(foreign)}: other examples."
            )

    def _summed_up(self, count: int) -> tuple[dict[str, Any], Schema]:
        """What the table says of itself, and its columns."""
        rows, makers, schema, failures = 0, dict[str, list[int]](), None, list[Failure]()
        for number in range(count):
            own, found = self._metadata(number)
            rows, schema = rows + own, schema or found
            failures += failures_of(found)
            if (maker := made_by(found)) is not None:
                makers.setdefault(json.dumps(maker), []).append(number)
        if failures and not rows:
            raise MeasureError(
                f"none of {len(failures)} examples could be measured; the first one: "
                f"{sentence(failures[0].error)} No table was written. Remove {self.folder} before another try."
            )
        self.failures = failures
        model = {} if "model" not in self._found else {"model": self._found["model"]}
        summary: dict[str, Any] = {**model, "parts": count}
        if failures:
            summary["failed"] = len(failures)
        if makers:
            # Which parts: only where there are several makers, whose last bits may differ.
            several = len(makers) > 1
            summary["made_by"] = [
                {**json.loads(maker), **({"parts": ranges(numbers, len(numbers))} if several else {})}
                for maker, numbers in sorted(makers.items(), key=lambda entry: entry[1][0])
            ]
        assert schema is not None
        return {**self.about, FOUND: summary}, schema

    def _finish_file(self, found: dict[str, Any], schema: Schema, count: int) -> None:
        # What is read is read before: that a part cannot be read must not be told as the table's fault.
        if self.out.lower().endswith(".csv"):
            self._read = self.table()
        with self.folder.scratch() as new:
            if self._read is not None:
                self._read.to_csv(new, index=False)
            else:
                self._write_parquet(new, schema.with_metadata({_KEY: json.dumps(found).encode()}), count)
            beside = f"{self._name}.failed.jsonl"
            if self.failures:
                self._parent.write(beside, _lines(self.failures))
            else:
                self._parent.discard(beside)  # of an earlier survey of this name
            self._parent.adopt(new, self._name)
        # Only now: killed in between, the table is there and whole, and the next run removes the parts.
        self.folder.remove()

    def _finish_dataset(self, found: dict[str, Any]) -> None:
        if self.failures:
            self.folder.write(_FAILED, _lines(self.failures))
        self.folder.write(self._about, json.dumps({**found, FOUND: {**found[FOUND], "finished": True}}).encode())
        if isinstance(self.folder, DiskFolder):
            self.folder.rename(Path(self.out))

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

    # ------------------------------------------------------------------------------------------------------ reading

    def _metadata(self, number: int) -> tuple[int, Schema]:
        """How many rows a part has, and its schema."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self._source(number)) as file:
                return file.metadata.num_rows, file.schema_arrow
        except (OSError, pa.ArrowException) as error:
            raise self._unread(number, error) from error

    def _part(self, number: int) -> Table:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_table(self._source(number))
        except (OSError, pa.ArrowException) as error:
            raise self._unread(number, error) from error

    def _source(self, number: int) -> Any:
        import pyarrow as pa

        data = self.folder.read(_named(number))
        if data is None:
            raise FileNotFoundError("it is gone")
        return pa.BufferReader(data)

    def _unread(self, number: int, error: Exception) -> MeasureError:
        return MeasureError(
            f"{self.folder.file(_named(number))}: cannot be read: {error}. Remove it, and run the same {self._what} "
            "again."
        )

    def table(self) -> DataFrame:
        """All that is done, which has to have room in memory."""
        import pyarrow as pa

        from ..frame import table_of

        if self._read is not None:
            return self._read
        if self.complete:
            return table_of(arrow_table(self.out).to_pydict())
        return table_of(pa.concat_tables(self._part(n) for n in sorted(self.present())).to_pydict())


def finished(out: str) -> Any:
    """What a table says of itself; None: there is no table of this name, or not all of it.

    Raises:
        MeasureError: there is something else of this name. OSError: it cannot be read.
    """
    parent, name = folder_and_name(out)
    if out.endswith(("/", os.sep)):
        folder = inside(parent, name)
        found = folder.read(_ABOUT_DATASET)
        if found is None and folder.names():
            raise MeasureError(f"{out} has files in it and is no survey: remove it, or choose another name.")
        told = None if found is None else json.loads(found)
        return told if told and told.get(FOUND, {}).pop("finished", False) else None
    if name not in parent.names():
        return None
    import pyarrow.parquet as pq

    try:
        told = (pq.read_schema(parent.open(name)).metadata or {}).get(_KEY)
        return {} if told is None else json.loads(told)
    except (OSError, ValueError):
        return {}


def failures_listed(out: str) -> list[Failure]:
    """The examples of a complete table that could not be measured."""
    parent, name = folder_and_name(out)
    is_dataset = out.endswith(("/", os.sep))
    found = inside(parent, name).read(_FAILED) if is_dataset else parent.read(f"{name}.failed.jsonl")
    return [Failure(**json.loads(line)) for line in (found or b"").decode().splitlines()]


def arrow_table(out: str) -> Table:
    """A complete table, in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parent, name = folder_and_name(out)
    if not out.endswith(("/", os.sep)):
        return pq.read_table(parent.open(name))
    folder = inside(parent, name)
    several = [pq.read_table(folder.open(x)) for x in sorted(folder.names()) if _PART.fullmatch(x)]
    told = {_KEY: folder.read(_ABOUT_DATASET) or b"null"}
    return pa.concat_tables([table.replace_schema_metadata(told) for table in several])


def read_table(out: str | os.PathLike[str]) -> DataFrame:
    """The table of a complete survey: a file, or a directory (also one of a name that does not end in ``/``).

    Returns:
        The columns of :func:`survey`; ``attrs["survey"]`` is what it says of itself, ``attrs["failed"]`` the examples
        that could not be measured.

    Raises:
        MeasureError: there is none, or it is not complete.
    """
    text = checks.path("out", out, MeasureError)
    if os.path.isdir(text) and not text.endswith("/"):
        text += "/"
    told = finished(text)
    if not told:
        parts = f"{text.rstrip('/')}.parts"
        begun = os.path.isdir(parts) or (text.endswith("/") and told is None)
        raise MeasureError(f"{text}: there is no complete survey{' here yet: not all of its parts are' * begun}.")
    table: DataFrame = arrow_table(text).to_pandas()
    table.attrs |= {"survey": told, "failed": [vars(f) for f in failures_listed(text)]}
    return table


def _strict(failures: list[Failure]) -> InputError:
    return InputError(
        f"{len(failures)} examples could not be measured; the first one, {failures[0].example}: {failures[0].error} "
        'No table was written; on_error="record" makes one of the others.'
    )


def _lines(failures: Iterable[Failure]) -> bytes:
    lines = [json.dumps({"example": f.example, "error": f.error}) for f in failures]
    return "".join(f"{line}\n" for line in lines).encode()


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
