"""The examples of a survey: texts, or token ids, one after the other from files of any size."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import checks
from ...errors import InputError
from .batches import Value

_ROWS = 1024


@dataclass(frozen=True)
class Corpus:
    """Files of examples, in the order given.

    A ``.jsonl`` file has an object, or a bare value, in each line; a ``.parquet`` file a column; every other file a
    text in each line. Empty lines are no examples. An example is a text or a list of token ids.

    Attributes:
        paths: the files.
        field: which key, or column; None: ``text``, else ``input_ids``.

    Raises:
        InputError: one of these is something else.
    """

    paths: tuple[str, ...]
    field: str | None = None

    def __post_init__(self) -> None:
        paths = [self.paths] if isinstance(self.paths, (str, os.PathLike)) else self.paths
        several = checks.several("Corpus: paths", paths, object, "the paths of files")
        object.__setattr__(self, "paths", tuple(checks.path("Corpus: paths", path) for path in several))
        if self.field is not None:
            checks.text("Corpus: field", self.field)

    def __iter__(self) -> Iterator[Value]:
        """The examples.

        Raises:
            InputError: a file cannot be read, or has something else in it; names the file and the line.
        """
        for path in self.paths:
            yield from self._read(path)(path)

    def about(self) -> list[dict[str, Any]]:
        """What tells these files from others: names, sizes, and when they were changed.

        Raises:
            InputError: a file is not there, or none was named.
        """
        if not self.paths:
            raise InputError("no file of prompts was named.")
        made = []
        for path in self.paths:
            try:
                found = os.stat(path)
            except OSError as error:
                raise InputError(f"{path}: there is no such file of prompts: {error.strerror}.") from error
            made.append({"path": os.path.abspath(path), "bytes": found.st_size, "changed": found.st_mtime_ns})
        return made

    def _read(self, path: str) -> Callable[[str], Iterator[Value]]:
        suffix = Path(path).suffix.lower()
        return {".jsonl": self._json_lines, ".ndjson": self._json_lines, ".parquet": self._parquet}.get(
            suffix, self._text_lines
        )

    def _text_lines(self, path: str) -> Iterator[Value]:
        for _, line in _numbered_lines(path):
            yield line

    def _json_lines(self, path: str) -> Iterator[Value]:
        for number, line in _numbered_lines(path):
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where}: is no JSON: {error}.") from error
            if isinstance(value, dict):
                value = value[self._column(list(value), where)]
            yield _example(value, where)

    def _parquet(self, path: str) -> Iterator[Value]:
        try:
            import pyarrow.parquet as pq
        except ModuleNotFoundError as error:
            raise InputError(f'{path}: Parquet needs the package pyarrow: pip install "hookattn[analyze]"') from error
        try:
            with pq.ParquetFile(path) as file:
                column, row = self._column(file.schema_arrow.names, path), 0
                # In batches of rows, so that a file larger than the memory is read like any other.
                for batch in file.iter_batches(_ROWS, columns=[column]):
                    for value in batch.column(0).to_pylist():
                        yield _example(value, f"{path}, row {row}")
                        row += 1
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise InputError(f"{path}: cannot be read as Parquet: {error}") from error

    def _column(self, names: Sequence[str], where: str) -> str:
        wanted = ("text", "input_ids") if self.field is None else (self.field,)
        for name in wanted:
            if name in names:
                return name
        raise InputError(f"{where}: has no {' or '.join(map(repr, wanted))}; it has {', '.join(names) or 'nothing'}.")


def _numbered_lines(path: str) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}.") from error


def _example(value: Any, where: str) -> Value:
    ids = isinstance(value, list) and bool(value) and all(type(i) is int for i in value)
    if ids or (isinstance(value, str) and value.strip()):
        return value  # type: ignore[no-any-return]
    raise InputError(f"{where}: expected a text or a list of token ids, got {str(value)[:60]!r}.")
