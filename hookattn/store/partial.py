"""A file under a temporary name next to its final one, which either becomes the final file whole or leaves no trace."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import weakref
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

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


def partial_name(path: Path) -> Path:
    """A new name beside a file for what will have its name: ``.NAME.PID-RANDOM.partial``."""
    # Cut, as the name with its additions must not grow too long for the file system.
    return path.with_name(f".{path.name[:_NAMED]}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")


_ours: set[Path] = set()  # the unfinished files of this process: another one of its number is a former process's


def remove_leftovers(path: Path) -> None:
    """Remove the unfinished files beside a file that a killed process left there, and none of a live process.

    A live one has the number that is in the name, or, on another machine or in another container, a lock on the file.
    """
    left = re.compile(rf"\.{re.escape(path.name[:_NAMED])}\.(\d+)-[0-9a-f]{{8}}{re.escape(PARTIAL)}")
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            found = left.fullmatch(name)
            file = path.parent / name
            if found is None or file in _ours:
                continue
            if int(found[1]) != os.getpid() and lives(int(found[1])):
                continue
            with contextlib.suppress(OSError), open(file, "rb") as held:
                if is_locked_now(held.fileno()):
                    file.unlink()


def lives(process: int) -> bool:
    """Whether there is a process of this number here."""
    if sys.platform == "win32":
        return False  # no signal asks; but Windows does not remove what a process has open
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def is_locked_now(descriptor: int) -> bool:
    """Whether a file has a lock of ours now: nobody else had one. True where there are no locks."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that knows no locks: the number of the process has to be enough
        return True
    return True


class _Rights(NamedTuple):
    """Who may do what with a file: its mode, and whose it is."""

    mode: int
    owner: int
    group: int


def _rights(path: Path) -> _Rights | None:
    """Those of a file; None: there is none, or this system knows no such rights."""
    if not hasattr(os, "fchmod"):
        return None
    try:
        found = os.stat(path)
    except OSError:
        return None
    return _Rights(stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid)


def _give(descriptor: int, rights: _Rights) -> None:
    """Give an open file these rights, as far as this process may."""
    now, mode = os.fstat(descriptor), rights.mode
    if (now.st_uid, now.st_gid) != rights[1:]:
        try:
            os.fchown(descriptor, rights.owner, rights.group)
        except OSError:
            try:
                os.fchown(descriptor, -1, rights.group)
            except OSError:
                # What its group might do is nothing for the members of another one.
                mode &= ~stat.S_IRWXG
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, mode)


class PartialFile:
    """An unfinished file. It is deleted by :meth:`discard`, by the garbage collector and at the interpreter's exit.

    It has the mode, the owner and the group of the file whose place it will take, as far as this process may give it
    those, and from its first byte on; where there is none, those of any new file. What a killed process left unfinished
    of the same file is removed. A forked process may read it, and neither writes nor finishes it.

    Raises:
        TraceWriteError: the file cannot be created there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Through a link to the file that it names, as any open() would write.
        self._final = Path(os.path.realpath(path))
        self._owner = os.getpid()
        with explaining_os_errors(path, "create the file"):
            if self._final.exists() and not self._final.is_file():
                # A rename would put the trace in the place of a device or a pipe.
                code = errno.EISDIR if self._final.is_dir() else errno.EINVAL
                raise OSError(code, os.strerror(code))
            remove_leftovers(self._final)
            self._temporary = partial_name(self._final)
            rights = _rights(self._final)
            # Not mkstemp, whose files nobody else may read: a new file is to have the permissions of any new file.
            most = 0o666 if rights is None else 0o600
            # Before there is anything to remove, so that it is removed wherever this is broken off.
            self._disk = _OnDisk(self._temporary, self._owner)
            self._finalizer = weakref.finalize(self, self._disk.remove)
            _ours.add(self._temporary)
            self._disk.file = self._file = FileIO(
                self._temporary, "x+", opener=lambda name, flags: os.open(name, flags, most)
            )
        is_locked_now(self._file.fileno())
        if rights is not None:
            _give(self._file.fileno(), rights)

    def rename(self, path: Path) -> None:
        """Let the file have another name when it is finished, in the same folder."""
        self.path, self._final = path, Path(os.path.realpath(path))

    @property
    def foreign(self) -> bool:
        """Whether another process opened it, of which this one is a fork."""
        return os.getpid() != self._owner

    @property
    def unfinished(self) -> bool:
        """Whether it is still there under its temporary name."""
        return self._temporary.exists()

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
        if (rights := _rights(self._final)) is not None:  # they may have changed since
            _give(self._file.fileno(), rights)
        os.fsync(self._file.fileno())
        self._file.close()  # Windows does not rename an open file
        os.replace(self._temporary, self._final)
        self._finalizer.detach()
        _ours.discard(self._temporary)
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
        """Delete the temporary file; without effect after :meth:`commit`, or a second time; can be broken off."""
        self._disk.remove()
        self._finalizer.detach()


class _OnDisk:
    """What there is of an unfinished file, apart from the object that it ends with.

    Attributes:
        path: its temporary name.
        owner: the process that writes it.
        file: that is open; None: not yet.
    """

    def __init__(self, path: Path, owner: int):
        self.path, self.owner = path, owner
        self.file: FileIO | None = None

    def remove(self) -> None:
        """Delete it, if there is any; can be broken off and called again."""
        if self.file is not None:
            self.file.close()
        if os.getpid() == self.owner:  # a forked child has the object too, and its parent is still writing
            with contextlib.suppress(OSError):
                self.path.unlink()
            _ours.discard(self.path)
