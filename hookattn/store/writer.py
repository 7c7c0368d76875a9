"""Writing a trace file: as a stream whose end is not known, or at once."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import TraceFileError, TraceWriteError
from .checksums import CHECKSUMS_KEY, begun, encode
from .format import DATA_ALIGNMENT, Entry, data_start, encode_document, encode_header, frame_header
from .indexing import Index, select
from .partial import CHUNK, PartialFile, explaining_os_errors
from .rawbytes import byte_blocks, check_storable, memory_of

RESERVE = 1 << 20
"""The room that a stream leaves for its header, which comes first in the file and is known last."""


class _Lane:
    """A run of tensors without holes, in a file from some offset on."""

    def __init__(self, file: PartialFile, start: int) -> None:
        self.file = file
        self.start = start
        self.alignment = 1
        self.entries: dict[str, Entry] = {}
        self.checksums: dict[str, int] = {}

    @property
    def size(self) -> int:
        return next(reversed(self.entries.values())).end if self.entries else 0

    def keeps_aligned(self, entry: Entry) -> bool:
        """Whether the tensor would be aligned here, and leave its successors so, as far as those before it tell."""
        alignment = max(self.alignment, entry.dtype.itemsize)
        if alignment == 1:
            alignment = 4  # a mask that comes first, with floats to follow
        return self.size % entry.dtype.itemsize == 0 and (self.size + entry.end) % alignment == 0

    def append(self, name: str, entry: Entry, tensor: Tensor) -> None:
        begin = self.size
        at, checksum = self.start + begin, begun(name, entry)
        for block in byte_blocks(tensor):
            self.file.write(at, block)
            checksum = zlib.crc32(block, checksum)
            at += len(block)
        self.alignment = max(self.alignment, entry.dtype.itemsize)
        # Only now, and in one step: what an interrupt leaves half written is overwritten by the next tensor.
        self.checksums[name] = checksum
        self.entries[name] = entry._replace(begin=begin, end=begin + entry.end)

    def read(self, name: str, index: Index) -> Tensor:
        """A copy of a part: the bytes of the file are moved at the end, so that it can't be mapped before."""
        entry = self.entries[name]
        selection = select(entry.shape, index)
        run = torch.empty(selection.span, dtype=entry.dtype, device="cpu")
        if run.nbytes:
            bytes_of_it, begin = memory_of(run), entry.begin + selection.offset * run.itemsize
            for first in range(0, run.nbytes, CHUNK):
                size = min(CHUNK, run.nbytes - first)
                bytes_of_it[first : first + size] = self.file.read(self.start + begin + first, size)
        if run.numel() == math.prod(selection.shape):
            return run.view(selection.shape)
        return run.as_strided(selection.shape, selection.strides).clone(memory_format=torch.contiguous_format)


class StreamWriter:
    """Writes tensors to a file as they come, and holds none of them.

    The bytes go to a temporary file in the same directory; :meth:`finish` gives it its name. Leaving the ``with`` block
    in any other way deletes it, and what was under the name before stays as it was. Safe to use from several threads.

    Args:
        path: the file's name; its directory has to exist.
        overwrite: whether a file that is already there may be replaced.
        reserve: the bytes set aside for the header. A longer header costs one more pass over the data at the end.
        checksums: whether the file gets them; not where somebody is about to change its header.

    Raises:
        TraceWriteError: the file cannot be created there, or it exists and ``overwrite`` is false.
    """

    def __init__(
        self, path: str | os.PathLike[str], overwrite: bool = True, *, reserve: int = RESERVE, checksums: bool = True
    ) -> None:
        self.path = Path(path)
        self._overwrite, self._checksums = overwrite, checksums
        self._lock = threading.RLock()
        self._state = "open"
        file = PartialFile(self.path)
        self._main = _Lane(file, -(-reserve // DATA_ALIGNMENT) * DATA_ALIGNMENT)
        self._odd: _Lane | None = None
        try:
            self._check_overwrite()
        except TraceWriteError:
            self.abort()
            raise

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. It can be changed or freed as soon as this returns.

        Raises:
            TraceWriteError: the name is taken, or safetensors cannot hold the tensor (the writer goes on); or the disk
                refused the bytes (the temporary file is deleted, and the writer is closed).
        """
        with self._lock:
            self._append(name, tensor)

    @property
    def size(self) -> int:
        """How many bytes the tensors take that were written so far."""
        with self._lock:
            return self._main.size + (0 if self._odd is None else self._odd.size)

    def tensor(self, name: str) -> Tensor:
        """Read one of the tensors that were written back, before the file is finished. Raises as :meth:`slice`."""
        return self.slice(name, ())

    def slice(self, name: str, index: Index) -> Tensor:
        """What ``tensor(name)[index]`` is, of which no more is read than from its first to its last element.

        ``index`` is an integer, a slice, or a tuple of these for the leading dimensions.

        Raises:
            IndexError, TypeError, ValueError: the index does not fit the shape, or is of another kind.
            KeyError: there is no tensor of this name.
            TraceFileError: it cannot be read back; or the writer is finished, or aborted and its file deleted.
        """
        with self._lock:
            lane = self._lane_of(name)
            if self.foreign and not (self._state == "open" and lane.file.unfinished):
                raise TraceFileError(
                    f"{self.path}: {name!r} was written by another process, of which this one is a fork, and is not "
                    "kept here. Load the file once that one has finished it."
                )
            if self._state == "finished":
                raise TraceFileError(f"{self.path}: the file is finished. Open it to read {name!r}.")
            if self._state == "aborted":
                raise TraceFileError(
                    f"{self.path}: {name!r} was in this file, which was deleted unfinished, as an error ended its "
                    "writing. Trace again; in memory (without to=), fields outlive an error."
                )
            try:
                return lane.read(name, index)
            except OSError as error:
                raise TraceFileError(
                    f"{self.path}: cannot read {name!r} back: {error.strerror or error}. Read it once the file is "
                    "finished, or trace without to=."
                ) from error

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor that was written. Raises KeyError."""
        return torch.Size(self._lane_of(name).entries[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor that was written. Raises KeyError."""
        return self._lane_of(name).entries[name].dtype

    def finish(self, document: Mapping[str, Any]) -> Path:
        """Write the header, wait for the disk, and give the file its name.

        Raises:
            TraceWriteError: the document is not JSON, or too long for a header (the writer goes on, and can be finished
                with another one); or the disk refused (the temporary file is deleted, and the writer is closed).
        """
        with self._lock:
            self._check_open()
            self._check_overwrite()
            main, odd = self._main, self._odd
            entries, end = dict(main.entries), main.size
            moves: list[tuple[PartialFile, int, int, int]] = []
            if odd is not None:
                # Descending item size keeps each of these aligned, if the first one is.
                for name, entry in sorted(odd.entries.items(), key=lambda item: -item[1].dtype.itemsize):
                    size = entry.end - entry.begin
                    entries[name] = entry._replace(begin=end, end=end + size)
                    moves.append((odd.file, entry.begin, size, end))
                    end += size
            sums = main.checksums | ({} if odd is None else odd.checksums)
            header = _header(
                entries, encode_document(document), [sums[n] for n in entries] if self._checksums else None
            )
            start = data_start(header)
            # Less data than room for a header is moved: the file would be padding for the most part.
            if start < main.start < main.size:
                start = main.start
            try:
                with self._aborting_on_error("finish the file", start + end):
                    main.file.move(main.start, main.size, start)
                    for file, begin, size, to in moves:
                        main.file.move(begin, size, start + to, file)
                    main.file.write(0, frame_header(header, start))
                    main.file.commit(start + end)
                self._state = "finished"
            finally:
                self.abort()  # half moved, the data is of no use any more
            return self.path

    def rename(self, path: Path) -> None:
        """Let the finished file have another name, in the same folder."""
        with self._lock:
            self._check_open()
            self._main.file.rename(path)
            self.path = path

    def abort(self) -> None:
        """Delete what was written; without effect once finished or aborted."""
        with self._lock:
            if self._state == "open":
                self._state = "aborted"
            for lane in (self._main, self._odd):
                if lane is not None:
                    lane.file.discard()  # the fork of a process closes what it has, and removes nothing

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()

    def _entry(self, name: str, tensor: Tensor) -> Entry:
        self._check_open()
        check_storable(name, tensor)
        if name in self._main.entries or (self._odd is not None and name in self._odd.entries):
            raise TraceWriteError(f"{self.path}: there is a tensor {name!r} already. Every tensor needs its own name.")
        return Entry(tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)

    def _lane_of(self, name: str) -> _Lane:
        for lane in (self._main, self._odd):
            if lane is not None and name in lane.entries:
                return lane
        raise KeyError(f"{self.path}: no tensor {name!r} was written")

    def _lane_for(self, entry: Entry) -> _Lane:
        # safetensors allows no hole between tensors, so one mask with an odd number of bytes would put all after it off
        # their alignment, and a misaligned tensor cannot be mapped, only copied. Such ones wait in a file of their own.
        if self._main.keeps_aligned(entry):
            return self._main
        if self._odd is None:
            self._odd = _Lane(PartialFile(self.path), 0)
        return self._odd

    def _append(self, name: str, tensor: Tensor, *, sorted_before: bool = False) -> None:
        entry = self._entry(name, tensor)
        with self._aborting_on_error(f"write the tensor {name!r}", entry.end):
            lane = self._main if sorted_before else self._lane_for(entry)
            lane.append(name, entry, tensor)

    @contextlib.contextmanager
    def _aborting_on_error(self, doing: str, needed: int) -> Iterator[None]:
        try:
            with explaining_os_errors(self.path, doing, needed):
                yield
        except TraceWriteError as error:
            if isinstance(error.__cause__, OSError):  # deleted after the free space was measured
                self.abort()
            raise

    @property
    def foreign(self) -> bool:
        """Whether another process opened the file, of which this one is a fork: it is that one's to finish."""
        return self._main.file.foreign

    def _check_open(self) -> None:
        if self.foreign:
            raise TraceWriteError(
                f"{self.path}: this file is being written by another process, of which this one is a fork. Open "
                "another one here."
            )
        if self._state != "open":
            raise TraceWriteError(f"{self.path}: this writer is {self._state}. Open another one.")

    def _check_overwrite(self) -> None:
        if not self._overwrite and self._main.file.exists():
            raise TraceWriteError(
                f"{self.path}: {os.strerror(errno.EEXIST)}. Choose another name, or pass overwrite=True."
            )


def _header(entries: Mapping[str, Entry], document: str, checksums: Sequence[int] | None) -> bytes:
    """The header's JSON, with the checksums of the tensors in the order of their data; None: without any."""
    metadata = {} if checksums is None else {CHECKSUMS_KEY: encode(document, checksums)}
    return encode_header(entries, document, metadata)


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    document: Mapping[str, Any],
    overwrite: bool = True,
) -> Path:
    """Write tensors that are all at hand, and a document, to a file no larger than they need.

    An iterable is used up before the first byte is written; :class:`StreamWriter` is for tensors that come one by one.

    Raises:
        TraceWriteError: as :class:`StreamWriter`. Nothing is left of the new file, and an older one is intact.
    """
    pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    for name, tensor in pairs:
        check_storable(name, tensor)
    # Without holes between them, descending item size is the order in which every tensor is aligned.
    pairs.sort(key=lambda pair: -pair[1].dtype.itemsize)
    entries, end = {}, 0
    for name, tensor in pairs:
        entries[name] = Entry(tensor.dtype, tuple(tensor.shape), end, end + tensor.nbytes)
        end += tensor.nbytes
    reserve = data_start(_header(entries, encode_document(document), [2**32 - 1] * len(entries)))
    with StreamWriter(path, overwrite, reserve=reserve) as writer:
        for name, tensor in pairs:
            writer._append(name, tensor, sorted_before=True)
        return writer.finish(document)
