"""The examples of a survey: texts, or token ids, one after the other from files of any size, here or elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ... import checks
from ...errors import InputError
from . import hub
from .batches import Value
from .blocks import Block, example, json_line, lines, parquet, streamed_rows, table_rows

_JSON = (".jsonl", ".ndjson", ".json")
_PARQUET = (".parquet", ".pq")
# What of a directory is a file of examples.
_KNOWN = (*_JSON, *_PARQUET, ".txt")
_AT_ONCE = 64
_QUICK = 64 << 20  # bytes of lines that are read in a second
_GLOB = frozenset("*?[")
# What a store says of a file that changes when its contents do, the surest first.
_CHANGED = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True)
class Corpus:
    """Files of examples, in the order given.

    A ``.jsonl`` file (``.ndjson``, ``.json``) has an object, or a bare value, in each line; a ``.parquet`` file a
    column; every other file a text in each line. Empty lines are no examples. An example is a text or a list of token
    ids.

    A name is one of

    - a file, also compressed: ``.gz``, ``.bz2``, ``.xz``, ``.zst``;
    - a pattern such as ``data/*.parquet``, or a directory: its files, sorted by name;
    - either of these in a store that fsspec knows, such as ``s3://bucket/data/*.jsonl.gz``;
    - ``hub:user/name``, ``hub:user/name/config:split``: a dataset, read by the package ``datasets`` as it downloads; or
      ``hub:DIRECTORY[:split]``.

    Attributes:
        paths: the names.
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
        for value in self.each():
            if isinstance(value, InputError):
                raise value
            yield value

    def each(self) -> Iterator[Value | InputError]:
        """The examples; an error in the place of one that cannot be read.

        Raises:
            InputError: a file cannot be read at all.
        """
        for block in self.blocks():
            for start in range(0, block.size, _AT_ONCE):
                yield from block.values(start, min(start + _AT_ONCE, block.size))

    def blocks(self) -> Iterator[Block]:
        """The same in blocks, of which only what is asked for is decoded.

        Raises:
            InputError: a file cannot be read at all.
        """
        for path in self.paths:
            if path.startswith(hub.PREFIX):
                rows = hub.rows_of(path)
                try:
                    yield from (table_rows if hasattr(rows, "__len__") else streamed_rows)(rows, path, self.field)
                except OSError as error:
                    raise InputError(f"{path}: cannot be read on: {error}") from error
                continue
            for file in _files(path):
                yield from self._blocks_of(file)

    def count(self) -> int:
        """How many examples there are: of Parquet its own word, of lines by reading them.

        Raises:
            InputError: a file cannot be read at all.
        """
        return sum(block.size for block in self.blocks())

    def quick_count(self) -> int | None:
        """How many examples there are, where that takes a second or less; None: it takes longer.

        Raises:
            InputError: a file cannot be read at all.
        """
        left = _QUICK
        for path in self.paths:
            if path.startswith(hub.PREFIX):
                if not hasattr(hub.rows_of(path), "__len__"):
                    return None
                continue
            for file in _files(path):
                if file.kind not in _PARQUET:
                    left -= file.quick_bytes()
        return self.count() if left >= 0 else None

    def about(self) -> list[dict[str, Any]]:
        """What tells these files from others: names, sizes, and when they were changed.

        Raises:
            InputError: a file is not there, or none was named.
        """
        if not self.paths:
            raise InputError("no file of prompts was named.")
        made: list[dict[str, Any]] = []
        for path in self.paths:
            if path.startswith(hub.PREFIX):
                made.append({"path": path, "version": hub.fingerprint(path)})
                continue
            made += [file.about() for file in _files(path)]
        return made

    def _blocks_of(self, file: _File) -> Iterator[Block]:
        kind = file.kind
        if kind in _PARQUET:
            with file.open(None) as opened:
                yield from parquet(opened, file.name, self.field)
            return
        read = json_line(self.field) if kind in _JSON else example
        try:
            with file.open("infer") as opened:
                yield from lines(opened, file.name, read)
        except (OSError, EOFError, ValueError) as error:
            raise InputError(f"{file.name}: cannot be read: {error}") from error


@dataclass(frozen=True)
class _File:
    """A file of a store.

    Attributes:
        name: as messages have it.
        store: fsspec's file system.
        path: there.
    """

    name: str
    store: Any
    path: str

    @property
    def kind(self) -> str:
        """The ending, without that of a compression."""
        from fsspec.utils import infer_compression

        path = PurePosixPath(self.path.lower())
        return path.with_suffix("").suffix if infer_compression(path.name) is not None else path.suffix

    def open(self, compression: str | None) -> Any:
        """The file, as bytes.

        Raises:
            InputError: it cannot be opened.
        """
        try:
            return self.store.open(self.path, "rb", compression=compression)
        except (OSError, ValueError) as error:
            if "zstd" in str(error):
                raise InputError(
                    f'{self.name}: .zst needs the package zstandard: pip install "hookattn[corpora]"'
                ) from error
            raise InputError(f"{self.name}: cannot be read: {error}") from error

    def quick_bytes(self) -> int:
        """How many bytes have to be read to count its lines; of one that is packed or elsewhere, too many."""
        packed = self.kind != PurePosixPath(self.path.lower()).suffix
        return _QUICK + 1 if packed or not _is_local(self.store) else os.stat(self.path).st_size

    def about(self) -> dict[str, Any]:
        """What tells it from others."""
        try:
            if _is_local(self.store):
                found = os.stat(self.path)
                return {"path": os.path.abspath(self.path), "bytes": found.st_size, "changed": found.st_mtime_ns}
            info = self.store.info(self.path)
        except OSError as error:
            raise InputError(f"{self.name}: there is no such file of prompts: {error.strerror or error}.") from error
        changed = next((str(info[key]) for key in _CHANGED if info.get(key) is not None), None)
        return {"path": self.name, "bytes": info.get("size"), "changed": changed}


def _files(path: str) -> list[_File]:
    """The files that a name stands for.

    Raises:
        InputError: there is none, or its store cannot be reached.
    """
    import fsspec

    try:
        if "://" not in path:
            store, inner = fsspec.filesystem("file"), path
        else:
            store, inner = fsspec.core.url_to_fs(path)
        # A file may be called [1].txt.
        if _GLOB & set(inner) and not store.exists(inner):
            found = sorted(store.glob(inner))
            if not found:
                raise InputError(f"{path}: no file has such a name.")
        elif store.isdir(inner):
            found = sorted(store.find(inner))
            found = [name for name in found if _is_of_examples(name, store)]
            if not found:
                raise InputError(f"{path}: no file of prompts is in this directory ({', '.join(_KNOWN)}).")
        elif store.exists(inner):
            return [_File(path, store, inner)]
        else:
            raise InputError(f"{path}: there is no such file of prompts.")
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{path}: cannot be reached: {error}") from error
    return [_File(name if _is_local(store) else store.unstrip_protocol(name), store, name) for name in found]


def _is_of_examples(name: str, store: Any) -> bool:
    hidden = any(part.startswith((".", "_")) for part in PurePosixPath(name).parts[-1:])
    return not hidden and _File(name, store, name).kind in _KNOWN


def _is_local(store: Any) -> bool:
    return "file" in ([store.protocol] if isinstance(store.protocol, str) else store.protocol)
