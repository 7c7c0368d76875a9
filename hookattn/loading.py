"""``load``: a trace file, opened lazily."""

from __future__ import annotations

from os import PathLike

from .trace import Trace


def load(path: str | PathLike[str]) -> Trace:
    """Open a trace file. Fields are memory-mapped: reading one head reads the bytes of one head.

    Raises:
        CorruptFileError: damaged or cut short.
        ForeignFileError: not a trace.
        NewerFormatError: written in a newer format than this version reads.
        TraceFileError: cannot be opened.
    """
    from .store.restore import load as read

    return read(path)
