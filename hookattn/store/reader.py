"""Reading a trace file: its header at once and strictly, its tensors when they are asked for."""

from __future__ import annotations

import os
import threading
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import TraceFileError
from .checksums import begun
from .format import LENGTH_BYTES, Entry
from .indexing import Index, select
from .mapping import map_tensor
from .partial import CHUNK, PARTIAL, is_being_written
from .validate import Header, corrupt, header_length, validate_header

_UNFINISHED = (
    "it is still being written, and has its name and header when the traced block ends. Inside the block read the "
    "trace that tracing() gave. (A file that a killed process left unfinished cannot be read.)"
)


class LazyFile:
    """A trace file, of which only what is asked for is read.

    Tensors share no memory with each other or with the file: they can be changed in place, and outlive :meth:`close`.
    Large ones are mapped, so that their pages are read when touched. Safe to use from several threads; pickled by path.
    A file that is replaced while open is read as it was; one that is cut short in place is not guarded against.

    Raises:
        TraceFileError: the file cannot be opened or read, and the three below.
        CorruptFileError: it is damaged or cut short.
        ForeignFileError: it is not a trace.
        NewerFormatError: it is in a newer format.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))
        try:
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            if is_being_written(self.path):
                raise TraceFileError(f"{self.path}: {_UNFINISHED}") from error
            raise TraceFileError(f"{self.path}: cannot open the file: {error.strerror or error}.") from error
        # A descriptor and a finalizer, as nobody is obliged to close a file that is read lazily.
        self._close = weakref.finalize(self, os.close, descriptor)
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._intact: dict[str, bool] = {}  # of the tensors that were held against their checksums
        try:
            self._header = _read_header(str(self.path), descriptor)
        except TraceFileError as error:
            self.close()
            if self.path.name.endswith(PARTIAL):
                raise type(error)(f"{self.path}: {_UNFINISHED}") from error
            raise
        except BaseException:
            self.close()
            raise

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document; the same object each time."""
        return self._header.document

    def keys(self) -> list[str]:
        """The tensors' names, in the order of their data."""
        return list(self._header.entries)

    def __contains__(self, name: object) -> bool:
        return name in self._header.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._header.entries)

    def __len__(self) -> int:
        return len(self._header.entries)

    def shape(self, name: str) -> torch.Size:
        """A tensor's shape, from the header alone. Raises KeyError."""
        return torch.Size(self._entry(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, from the header alone. Raises KeyError."""
        return self._entry(name).dtype

    def entry(self, name: str) -> Entry | None:
        """What the header says of a tensor; None: there is none of this name."""
        return self._header.entries.get(name)

    def tensor(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            KeyError: there is no tensor of this name.
            TraceFileError: the file is closed, or the system does not let it be mapped.
            CorruptFileError: the file is shorter than it was when it was opened.
        """
        return self.slice(name, ())

    def slice(self, name: str, index: Index) -> Tensor:
        """What ``tensor(name)[index]`` is, of which only the pages from the first to the last element are mapped.

        ``index`` is an integer, a slice, or a tuple of these for the leading dimensions.

        Raises:
            IndexError, TypeError, ValueError: the index does not fit the shape, or is of another kind.
            KeyError, TraceFileError, CorruptFileError: as :meth:`tensor`.
        """
        entry = self._entry(name)
        selection = select(entry.shape, index)
        dtype = torch.uint8 if entry.dtype is torch.bool else entry.dtype
        # Against close(): the number of a closed descriptor soon belongs to another file.
        with self._lock:
            if not self._close.alive:
                raise TraceFileError(f"{self.path}: the file is closed. Open it again to read {name!r}.")
            try:
                found = map_tensor(self._descriptor, self._header.start + entry.begin, dtype, selection)
            except ValueError:
                size = os.fstat(self._descriptor).st_size
                corrupt(str(self.path), f"the file was cut to {size} bytes while it was open, in or before {name!r}")
            except OSError as error:
                raise TraceFileError(
                    f"{self.path}: cannot map {name!r}: {error.strerror or error}. Drop tensors that are not needed "
                    "any more, or read a smaller slice."
                ) from error
        if dtype is entry.dtype:
            return found
        if found.numel() and int(found.max()) > 1:
            # Another byte is neither true nor false, and torch's operations make of it what they like.
            corrupt(str(self.path), f"the tensor {name!r} is bool, and has a byte that is neither 0 nor 1")
        return found.view(torch.bool)

    def checksum(self, name: str) -> int | None:
        """What the header says is the checksum of a tensor's name, dtype, shape and bytes; nothing is read for it.

        Returns:
            None: the file has no checksums, as those before format 1.3.

        Raises:
            KeyError: there is no tensor of this name.
        """
        self._entry(name)
        return None if self._header.checksums is None else self._header.checksums[name]

    def intact(self, name: str) -> bool | None:
        """Whether a tensor's bytes, name, dtype and shape are what the file has a checksum of; read once, in pieces.

        Returns:
            None: the file has no checksums, as those before format 1.3.

        Raises:
            KeyError, TraceFileError, CorruptFileError: as :meth:`tensor`.
        """
        entry, checksums = self._entry(name), self._header.checksums
        if checksums is None:
            return None
        if name not in self._intact:
            found = begun(name, entry)
            for begin in range(entry.begin, entry.end, CHUNK):
                data = self._bytes(name, self._header.start + begin, min(CHUNK, entry.end - begin))
                found = zlib.crc32(data, found)
            self._intact[name] = found == checksums[name]
        return self._intact[name]

    def checked(self, name: str) -> Tensor:
        """One tensor, held against its checksum, if there is one, before it is handed out.

        Raises:
            CorruptFileError: it is not what was written; and as :meth:`tensor`.
        """
        if self.intact(name) is False:
            corrupt(str(self.path), f"the tensor {name!r} does not have the checksum that the file says")
        return self.tensor(name)

    def _bytes(self, name: str, begin: int, size: int) -> bytes:
        with self._lock:
            if not self._close.alive:
                raise TraceFileError(f"{self.path}: the file is closed. Open it again to read {name!r}.")
            try:
                # Not closed with the file object: the descriptor stays with its owner.
                with open(self._descriptor, "rb", buffering=0, closefd=False) as file:
                    file.seek(begin)
                    data = b""
                    while len(data) < size and (more := file.read(size - len(data))):
                        data += more
            except OSError as error:
                raise TraceFileError(f"{self.path}: cannot read {name!r}: {error.strerror or error}.") from error
        if len(data) < size:
            corrupt(str(self.path), f"the file was cut while it was open, in or before {name!r}")
        return data

    def close(self) -> None:
        """Close the file. Tensors that were read stay valid; reading another one raises."""
        with self._lock:
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.path,)

    def __repr__(self) -> str:
        return f"LazyFile({str(self.path)!r}, {len(self)} tensors{'' if self._close.alive else ', closed'})"

    def _entry(self, name: str) -> Entry:
        entry = self._header.entries.get(name)
        if entry is None:
            few = ", ".join(map(repr, self.keys()[:5]))
            more = f", and {len(self) - 5} more" if len(self) > 5 else ""
            raise KeyError(f"{self.path}: no tensor {name!r}; there are {few or 'none'}{more}")
        return entry


def _read_header(path: str, descriptor: int) -> Header:
    try:
        size = os.fstat(descriptor).st_size
        # Not closed with the file object: the descriptor stays with its owner.
        with open(descriptor, "rb", closefd=False) as file:
            head = file.read(LENGTH_BYTES + 1)
            length = header_length(path, head, size)
            file.seek(LENGTH_BYTES)
            raw = file.read(length)
    except OSError as error:
        raise TraceFileError(f"{path}: cannot read the file: {error.strerror or error}.") from error
    if len(raw) != length:
        corrupt(path, f"expected a header of {length} bytes, and got {len(raw)}")
    return validate_header(path, raw, size - LENGTH_BYTES - length)
