"""A Trace that is written while the model runs, call by call."""

from __future__ import annotations

from os import PathLike, fspath

from torch import Tensor

from ..call import Call
from ..trace import TraceData
from .document import call_entry, document_of
from .names import Names
from .restore import load
from .writer import StreamWriter


class Stream:
    """Writes the calls of a running trace as they come; the fields leave memory."""

    def __init__(self, path: str | PathLike[str], trace: TraceData):
        self.path, self.trace = fspath(path), trace
        self.writer = StreamWriter(path)
        self.names = Names()
        self.written: dict[int, dict[str, str | None]] = {}

    def add(self, call: Call) -> None:
        """Write one call's fields and drop them."""
        entries: dict[str, str | None] = {}
        for field, value in list(call.fields.items()):
            entries[field] = None
            if isinstance(value, Tensor):
                name, new = self.names.name(call, field, value)
                if new:
                    self.writer.add(name, value)
                entries[field] = name
                call.fields[field] = None
        if isinstance(call.scale, Tensor):
            name, _ = self.names.name(call, "scale", call.scale)
            self.writer.add(name, call.scale)
            entries["scale"] = name
        self.written[id(call)] = entries

    def finish(self) -> None:
        """Complete the file and let the trace read its fields from it."""
        for call in self.trace.calls:
            if id(call) not in self.written:
                self.add(call)
        extra: dict[str, Tensor] = {}
        calls = [call_entry(c, self.written[id(c)], extra, False) for c in self.trace.calls]
        self.writer.finish(document_of(self.trace, calls, False))
        stored = load(self.path, TraceData)
        for call, on_disk in zip(self.trace.calls, stored.calls, strict=True):
            call.fields = on_disk.fields
        self.trace.path = self.path

    def close(self) -> None:
        """Remove what is unfinished."""
        self.writer.abort()
