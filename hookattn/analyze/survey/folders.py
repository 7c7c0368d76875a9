"""A folder that several processes write to: files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
from pathlib import Path

from ...store.partial import lives

_HOST = re.sub(r"[^\w]+", "-", socket.gethostname())[:40]


def temporary_name(name: str) -> str:
    """A name that no other process on any machine has: ``NAME.HOST.PID-RANDOM.partial``."""
    return f"{name}.{_HOST}.{os.getpid()}-{secrets.token_hex(4)}.partial"


def _is_leftover(name: str) -> bool:
    """Whether a name is that of a process of this machine that lives no more."""
    found = re.fullmatch(rf".*\.{re.escape(_HOST)}\.(\d+)-[0-9a-f]{{8}}\.partial", name)
    return found is not None and int(found[1]) != os.getpid() and not lives(int(found[1]))


class Folder:
    """A folder on a disk, which machines may share. All methods raise OSError."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def make(self) -> None:
        """Make it, if it is not there, and remove what killed processes of this machine left in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name in self.names():
            if _is_leftover(name):
                with contextlib.suppress(OSError):
                    (self.path / name).unlink()

    def names(self) -> list[str]:
        """Of its files; none where there is no folder."""
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes | None:
        """A file; None: it is not there."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes | memoryview) -> None:
        """A whole file under a name, in the place of what was there. Whoever writes the same twice does no harm."""
        new = self._written(name, data)
        try:
            os.replace(new, self.path / name)
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    def create(self, name: str, data: bytes) -> None:
        """A whole file under a name, unless there is one: of several processes, the first one's stays."""
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

    def remove(self) -> None:
        """All of it, as far as that can be removed."""
        shutil.rmtree(self.path, ignore_errors=True)
