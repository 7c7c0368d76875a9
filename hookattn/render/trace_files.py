"""The file of a trace: its own, where it is as it was written, else a temporary one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import fspath

from ..calls.fields import Field, InFile
from ..calls.key_history import Continued
from ..errors import TraceFileError
from ..printable import printable
from ..store import LazyFile
from ..store.document import save
from ..store.scratch import scratch
from ..traces import Trace, TraceLike, as_trace, load

__all__ = ["TraceLike", "as_trace", "name_of", "title_of", "trace_file"]


def name_of(trace: Trace) -> str:
    """What a trace is called where there is room for one line."""
    return os.path.basename(trace.path) if trace.path else "trace"


def title_of(trace: Trace) -> str:
    """The model's class, and the file."""
    return printable(" · ".join(x for x in (str(trace.model.get("class") or ""), name_of(trace)) if x))


def _is_stored(place: Field) -> bool:
    """Whether a field of a trace that has a file is read from there, or is none."""
    return place is None or (isinstance(place, InFile) and isinstance(place.file, LazyFile))


@contextmanager
def trace_file(trace: TraceLike) -> Iterator[str]:
    """The path of a file of this trace, each call with its keys whole; a temporary one is deleted after the block.

    Raises:
        InputError, TraceFileError: as :func:`hookattn.traces.as_trace`.
        TraceWriteError: no room for the temporary file.
    """
    found = as_trace(trace)
    linked = any(isinstance(place, Continued) for call in found.calls for place in call.fields.values())
    if found.path is not None and not linked and (found is not trace or _as_written(found, found.path)):
        yield os.path.abspath(fspath(found.path))
        return
    with scratch() as folder:
        # The viewer reads one tensor for each field: it knows nothing of keys that go on from those of other calls.
        yield save(found, os.path.join(folder, "trace.safetensors"), linked=False)


def _as_written(trace: Trace, path: str) -> bool:
    """Whether the file under the trace's name still holds it: not a part of it, nor an older state."""
    try:
        there = load(path)
    except TraceFileError:
        return False  # it can still be read: the trace holds the file open
    return (
        len(there) == len(trace)
        and (there.tokens, there.stack_tokens, there.segments, there.notes)
        == (trace.tokens, trace.stack_tokens, trace.segments, trace.notes)
        and all(
            (a.site, a.step, a.certificate, list(a.fields)) == (b.site, b.step, b.certificate, list(b.fields))
            and all(map(_is_stored, b.fields.values()))
            for a, b in zip(there.calls, trace.calls, strict=True)
        )
    )
