"""The examples of a survey: texts, or token ids, one after the other from files of any size, here or elsewhere."""

from __future__ import annotations

import lzma
import os
import zlib
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
_PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
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
            with file.open(False) as opened:
                yield from parquet(opened, file.name, self.field)
            return
        read = json_line(self.field) if kind in _JSON else example
        try:
            with file.open(True) as opened:
                yield from lines(opened, file.name, read)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
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
        path = PurePosixPath(self.path.lower())
        return path.with_suffix("").suffix if path.suffix in _PACKED else path.suffix

    def open(self, unpacked: bool) -> Any:
        """The file, as bytes.

        Raises:
            InputError: it cannot be opened.
        """
        packing = _PACKED.get(PurePosixPath(self.path.lower()).suffix) if unpacked else None
        try:
            if packing != "zstd":
                return self.store.open(self.path, "rb", compression=packing)
            # The package zstandard, as fsspec uses it, ends after the first frame, and without a word where a file is
            # cut short.
            import pyarrow as pa

            return pa.CompressedInputStream(pa.PythonFile(self.store.open(self.path, "rb"), "r"), "zstd")
        except ModuleNotFoundError as error:
            raise InputError(f'{self.name}: .zst needs the package pyarrow: pip install "hookattn[analyze]"') from error
        except (OSError, ValueError) as error:
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
