"""Temporary directories for files of a trace, and what a killed process left of its own.

A trace that is shown may be written to a temporary file for as long as that takes. SIGKILL leaves it there, with all
that is in it, in a directory that nobody but its user can read. Whoever makes such a directory next removes those whose
process is gone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .partial import is_locked_now, lives

_LOCK = ".in-use"
_NAME = re.compile(r"hookattn-(\d+)-[0-9A-Za-z_]+")


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """A temporary directory of mode 0700 that is gone after the block."""
    remove_left_directories()
    made = tempfile.TemporaryDirectory(prefix=f"hookattn-{os.getpid()}-", ignore_cleanup_errors=True)
    with made as folder, open(os.path.join(folder, _LOCK), "wb") as held:
        is_locked_now(held.fileno())  # so that it is seen to be in use from another container, too
        yield folder


def remove_left_directories() -> None:
    """Remove the temporary directories of this user's processes that are gone."""
    root = Path(tempfile.gettempdir())
    with contextlib.suppress(OSError):
        for name in os.listdir(root):
            found = _NAME.fullmatch(name)
            if found is not None and not lives(int(found[1])):
                _remove(root / name)


def _remove(folder: Path) -> None:
    """Remove one, unless it is another user's, a link, or held by a process that is not seen from here."""
    with contextlib.suppress(OSError):
        about = os.lstat(folder)
        if not stat.S_ISDIR(about.st_mode) or (hasattr(os, "getuid") and about.st_uid != os.getuid()):
            return
        try:
            with open(folder / _LOCK, "rb") as held:
                free = is_locked_now(held.fileno())
        except FileNotFoundError:  # its process was killed before it had a file in it, or is about to make one
            os.rmdir(folder)
            return
        if free:
            shutil.rmtree(folder, ignore_errors=True)
