"""A file under a temporary name next to its final one, which either becomes the final file whole or leaves no trace."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import weakref
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from ..errors import TraceWriteError

CHUNK = 8 << 20
"""How many bytes are held in memory while data moves."""

_ADVICE = {
    errno.ENOSPC: "Free some space, or write to another disk",
    errno.EDQUOT: "Free some of the quota, or write to another disk",
    errno.EFBIG: "The file system or the process (ulimit -f) limits a file's size: write to another disk, or less",
    errno.ENOENT: "Create the directory first",
    errno.ENOTDIR: "Choose a path whose parent is a directory",
    errno.EISDIR: "Choose the name of a file in it",
    errno.EACCES: "Choose a directory that you may write to",
    errno.EPERM: "Choose a directory that you may write to",
    errno.EROFS: "Choose a directory that you may write to",
    errno.ENAMETOOLONG: "Choose a shorter name",
}


@contextlib.contextmanager
def explaining_os_errors(path: Path, doing: str, needed: int | None = None) -> Iterator[None]:
    """Turn an :class:`OSError` into a :class:`TraceWriteError` that says where, what for, how much, and what to do."""
    try:
        yield
    except OSError as error:
        size = ""
        if needed is not None:
            size = f" ({needed} bytes needed"
            with contextlib.suppress(OSError):
                size += f", {shutil.disk_usage(path.parent).free} free"
            size += ")"
        advice = _ADVICE.get(error.errno or 0, "Choose another path")
        raise TraceWriteError(
            f"{path}: could not {doing}{size}: {error.strerror or error}. {advice}. What was under this "
            "name before, if anything, is unchanged."
        ) from error


# Characters of the final name that the temporary one has.
_NAMED = 40
PARTIAL = ".partial"
"""How the name of an unfinished file ends."""


def is_being_written(path: Path) -> bool:
    """Whether there is no such file yet, but an unfinished one that will have its name."""
    start = f".{path.name[:_NAMED]}."
    with contextlib.suppress(OSError):
        return any(x.name.startswith(start) and x.name.endswith(PARTIAL) for x in path.parent.iterdir())
    return False


class PartialFile:
    """An unfinished file. It is deleted by :meth:`discard`, by the garbage collector and at the interpreter's exit.

    Raises:
        TraceWriteError: the file cannot be created there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Through a link to the file that it names, as any open() would write.
        self._final = Path(os.path.realpath(path))
        with explaining_os_errors(path, "create the file"):
            if self._final.exists() and not self._final.is_file():
                # A rename would put the trace in the place of a device or a pipe.
                code = errno.EISDIR if self._final.is_dir() else errno.EINVAL
                raise OSError(code, os.strerror(code))
            # Cut, as the name with its additions must not grow too long for the file system.
            stem = self._final.name[:_NAMED]
            self._temporary = self._final.with_name(f".{stem}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
            # Not mkstemp, whose files nobody else may read: the trace is to have the permissions of any new file.
            self._file = FileIO(self._temporary, "x+")
        self._finalizer = weakref.finalize(self, _discard, self._file, self._temporary, os.getpid())

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of ``data`` at ``offset``. Raises OSError."""
        view = memoryview(data)
        self._file.seek(offset)
        while view:
            view = view[self._file.write(view) :]  # a raw write may be a short one

    def read(self, offset: int, size: int) -> bytes:
        """Read exactly ``size`` bytes, at most :data:`CHUNK`, back. Raises OSError."""
        data = b""
        while len(data) < size:
            more = self._read(offset + len(data), size - len(data))
            if not more:
                raise OSError(errno.EIO, "the temporary file is shorter than what was written to it")
            data += more
        return data

    def _read(self, offset: int, size: int) -> bytes:
        # A forked process that reads here must not move the place where its parent writes.
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), size, offset)
        self._file.seek(offset)
        return self._file.read(size)

    def move(self, begin: int, size: int, to: int, source: PartialFile | None = None) -> None:
        """Copy a range, of this file or of ``source``, to an offset here; the two may overlap. Raises OSError."""
        if source is None and to == begin:
            return
        starts = range(0, size, CHUNK)
        # From the side it moves to, so that no chunk is overwritten before it was read.
        for start in starts if source is not None or to <= begin else reversed(starts):
            self.write(to + start, (source or self).read(begin + start, min(CHUNK, size - start)))

    def commit(self, size: int) -> None:
        """Cut the file to ``size``, and give it its final name once its bytes are on the disk. Raises OSError."""
        self._file.truncate(size)
        os.fsync(self._file.fileno())
        self._file.close()  # Windows does not rename an open file
        os.replace(self._temporary, self._final)
        self._finalizer.detach()
        # The name is in place: where a directory cannot be synced (Windows, some network disks), that is all there is.
        with contextlib.suppress(OSError):
            directory = os.open(self._final.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def exists(self) -> bool:
        """Whether there is a file under the final name."""
        return os.path.lexists(self._final)

    def discard(self) -> None:
        """Delete the temporary file; without effect after :meth:`commit`, or a second time."""
        self._finalizer()


def _discard(file: FileIO, temporary: Path, owner: int) -> None:
    file.close()
    if os.getpid() == owner:  # a forked child has the object too, and its parent is still writing
        with contextlib.suppress(OSError):
            temporary.unlink()
