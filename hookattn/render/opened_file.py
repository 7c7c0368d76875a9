"""A file by its descriptor: it is read as it was opened, whatever is under its name meanwhile, or not at all."""

from __future__ import annotations

import os
import stat
import threading
import weakref
from collections.abc import Iterator

from ..errors import TraceFileError
from ..store import LazyFile

CHUNK = 1 << 20
"""Bytes of one read."""


class Changed(Exception):
    """The file was written to after it was opened."""


class OpenedFile:
    """A trace file, held open until this object goes.

    A file that takes its name, or a link of its name that leads elsewhere, is another file and is not read. Where the
    file itself is written to, what was opened is gone, and reading raises :class:`Changed`.

    Args:
        path: the file.

    Attributes:
        name: its name, without directories.
        size: bytes.
        tag: what tells its state from any other: inode, size and time of change.

    Raises:
        TraceFileError: no trace file, or another one was under the name a moment later.
    """

    def __init__(self, path: str) -> None:
        self.name = os.path.basename(path)
        LazyFile(path).close()
        try:
            # Not waiting: by now a pipe may be under the name.
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            raise TraceFileError(f"{path}: cannot be opened: {error.strerror or error}.") from error
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._lock = threading.Lock()
        found = os.fstat(self._descriptor)
        self.size, self.tag = found.st_size, _tag(found)
        if not stat.S_ISREG(found.st_mode):
            self._close()
            raise TraceFileError(f"{path}: is no file any more.")
        try:
            # What was checked is what is held: a file that was exchanged after the one check is found by the other.
            LazyFile(path).close()
            same = _tag(os.stat(path)) == self.tag
        except OSError:
            same = False
        except TraceFileError:
            self._close()
            raise
        if not same:
            self._close()
            raise TraceFileError(f"{path}: was exchanged while it was opened; try again.")

    def check(self) -> None:
        """Raise Changed if the file was written to, OSError if nobody can say."""
        if _tag(os.fstat(self._descriptor)) != self.tag:
            raise Changed

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from ``start`` up to ``end``, in pieces, all of them of the state that was opened.

        Raises:
            Changed: it was written to.
            OSError: it can't be read.
        """
        while start < end:
            data = self._read_at(start, min(CHUNK, end - start))
            self.check()
            if not data:
                raise Changed
            start += len(data)
            yield data

    def _read_at(self, start: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._descriptor, size, start)
        with self._lock:  # the place in a file is one for all threads
            os.lseek(self._descriptor, start, os.SEEK_SET)
            return os.read(self._descriptor, size)


def _tag(found: os.stat_result) -> str:
    return f'"{found.st_dev:x}-{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}"'
