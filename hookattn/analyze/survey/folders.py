"""A folder that several processes write to, on a disk or in an object store: files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ...errors import TraceWriteError
from ...store.partial import lives

_HOST = re.sub(r"[^\w]+", "-", socket.gethostname())[:40]


def temporary_name(name: str) -> str:
    """A name that no other process on any machine has: ``NAME.HOST.PID-RANDOM.partial``."""
    return f"{name}.{_HOST}.{os.getpid()}-{secrets.token_hex(4)}.partial"


def _is_leftover(name: str) -> bool:
    """Whether a name is that of a process of this machine that lives no more."""
    found = re.fullmatch(rf".*\.{re.escape(_HOST)}\.(\d+)-[0-9a-f]{{8}}\.partial", name)
    return found is not None and int(found[1]) != os.getpid() and not lives(int(found[1]))


class Folder(Protocol):
    """What a survey asks of a folder. All raise OSError."""

    def make(self) -> None:
        """Make it, if it is not there."""

    def names(self) -> list[str]:
        """Of its files; none where there is no folder."""

    def file(self, name: str) -> str:
        """A file's whole name, for messages."""

    def read(self, name: str) -> bytes | None:
        """A file; None: it is not there."""

    def open(self, name: str) -> Any:
        """What pyarrow reads a file of."""

    def write(self, name: str, data: bytes | memoryview) -> None:
        """A whole file under a name, in the place of what was there. Whoever writes the same twice does no harm."""

    def create(self, name: str, data: bytes) -> None:
        """A whole file under a name, unless there is one: of several processes, the first one's stays."""

    def discard(self, name: str) -> None:
        """Remove a file, if it is there."""

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """A new name on a disk here, for what :meth:`adopt` takes; what is there after the block is removed."""

    def adopt(self, new: Path, name: str) -> None:
        """Give a file that is here and whole its name in this folder."""

    def remove(self) -> None:
        """All of it, as far as that can be removed."""


class DiskFolder:
    """A :class:`Folder` on a disk, which machines may share."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def make(self) -> None:
        """Likewise; what killed processes of this machine left in it is removed."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name in self.names():
            if _is_leftover(name):
                with contextlib.suppress(OSError):
                    self.discard(name)

    def names(self) -> list[str]:
        """As :class:`Folder` has it."""
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []

    def file(self, name: str) -> str:
        """As :class:`Folder` has it."""
        return str(self.path / name)

    def read(self, name: str) -> bytes | None:
        """As :class:`Folder` has it."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def open(self, name: str) -> Any:
        """As :class:`Folder` has it."""
        return self.file(name)

    def write(self, name: str, data: bytes | memoryview) -> None:
        """As :class:`Folder` has it."""
        new = self._written(name, data)
        try:
            os.replace(new, self.path / name)
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    def create(self, name: str, data: bytes) -> None:
        """As :class:`Folder` has it."""
        new = self._written(name, data)
        try:
            os.link(new, self.path / name)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not (self.path / name).exists():
                os.replace(new, self.path / name)
        finally:
            new.unlink(missing_ok=True)

    def _written(self, name: str, data: bytes | memoryview) -> Path:
        new = self.path / temporary_name(name)
        try:
            with open(new, "xb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                # A name must not survive a loss of power that its bytes do not.
                os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise
        return new

    def discard(self, name: str) -> None:
        """As :class:`Folder` has it."""
        (self.path / name).unlink(missing_ok=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """As :class:`Folder` has it."""
        new = self.path / temporary_name("table")
        try:
            yield new
        finally:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)

    def adopt(self, new: Path, name: str) -> None:
        """As :class:`Folder` has it."""
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, self.path / name)

    def rename(self, to: Path) -> None:
        """Give the folder another name, that of an empty one perhaps."""
        os.replace(self.path, to)

    def remove(self) -> None:
        """As :class:`Folder` has it."""
        shutil.rmtree(self.path, ignore_errors=True)


class StoreFolder:
    """A :class:`Folder` in a store that fsspec knows, where a file that is being written is not there yet."""

    def __init__(self, store: Any, path: str) -> None:
        self.store, self.path = store, path.rstrip("/")

    def __str__(self) -> str:
        return str(self.store.unstrip_protocol(self.path))

    def make(self) -> None:
        """As :class:`Folder` has it."""
        self.store.makedirs(self.path, exist_ok=True)

    def names(self) -> list[str]:
        """As :class:`Folder` has it."""
        self.store.invalidate_cache(self.path)  # others write there, too
        try:
            return [name.rstrip("/").rpartition("/")[2] for name in self.store.ls(self.path, detail=False)]
        except FileNotFoundError:
            return []

    def file(self, name: str) -> str:
        """As :class:`Folder` has it."""
        return f"{self}/{name}"

    def read(self, name: str) -> bytes | None:
        """As :class:`Folder` has it."""
        try:
            return bytes(self.store.cat_file(f"{self.path}/{name}"))
        except FileNotFoundError:
            return None

    def open(self, name: str) -> Any:
        """As :class:`Folder` has it."""
        return self.store.open(f"{self.path}/{name}", "rb")

    def write(self, name: str, data: bytes | memoryview) -> None:
        """As :class:`Folder` has it."""
        self.store.pipe_file(f"{self.path}/{name}", bytes(data))

    def create(self, name: str, data: bytes) -> None:
        """As :class:`Folder` has it, but that of two processes at the same moment the second one's may stay."""
        if self.read(name) is None:
            self.write(name, data)

    def discard(self, name: str) -> None:
        """As :class:`Folder` has it."""
        with contextlib.suppress(FileNotFoundError):
            self.store.rm_file(f"{self.path}/{name}")

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """As :class:`Folder` has it."""
        with tempfile.TemporaryDirectory() as here:
            yield Path(here) / "table"

    def adopt(self, new: Path, name: str) -> None:
        """As :class:`Folder` has it."""
        self.store.put_file(str(new), f"{self.path}/{name}")

    def remove(self) -> None:
        """As :class:`Folder` has it."""
        with contextlib.suppress(OSError):
            self.store.rm(self.path, recursive=True)


def folder_and_name(out: str) -> tuple[DiskFolder | StoreFolder, str]:
    """The folder that something is in, and its name there.

    Raises:
        TraceWriteError: fsspec does not know the store, or a library for it is missing.
    """
    if "://" not in out:
        path = Path(out)
        return DiskFolder(path.parent), path.name
    import fsspec

    try:
        store, inner = fsspec.core.url_to_fs(out)
    except (ValueError, ImportError, OSError) as error:
        raise TraceWriteError(f"{out}: cannot be reached: {error}") from error
    parent, _, name = inner.rstrip("/").rpartition("/")
    if "file" in ([store.protocol] if isinstance(store.protocol, str) else store.protocol):
        return DiskFolder(parent or "/"), name
    return StoreFolder(store, parent), name


def inside(parent: DiskFolder | StoreFolder, name: str) -> DiskFolder | StoreFolder:
    """A folder in a folder."""
    if isinstance(parent, DiskFolder):
        return DiskFolder(parent.path / name)
    return StoreFolder(parent.store, f"{parent.path}/{name}")
