"""A Trace that is written while the model runs, call by call."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

import torch
from torch import Size, Tensor

from ..calls.call import Call
from ..calls.fields import InFile, tensor_of
from ..calls.trace_data import TraceData
from ..errors import TraceFileError
from .document import call_entry, document_of
from .names import Names
from .reader import LazyFile
from .restore import trace_of
from .writer import StreamWriter


class GrowingFile:
    """A trace file from its first tensor on: what was written can be read, before it is finished and afterwards.

    Safe to use from several threads.

    Args:
        path: as :class:`StreamWriter` takes it, and raises.
    """

    def __init__(self, path: str | PathLike[str]):
        self.writer = StreamWriter(path)
        self._finished: LazyFile | None = None
        self._lock = threading.RLock()

    def tensor(self, name: str) -> Tensor:
        """One tensor, read anew. Raises as :meth:`StreamWriter.tensor` or :meth:`LazyFile.tensor`."""
        with self._lock:  # between the writer's end and the opening of the finished file nobody could read
            return (self.writer if self._finished is None else self._finished).tensor(name)

    def shape(self, name: str) -> Size:
        """Its shape, without reading it. Raises KeyError."""
        return self.writer.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype, without reading it. Raises KeyError."""
        return self.writer.dtype(name)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._finished is None:
            raise TraceFileError(
                f"{self.writer.path}: fields that are in an unfinished file can't be pickled. Do it after the traced "
                "block, or trace without to=."
            )
        return self._finished.__reduce__()

    def finish(self, document: Mapping[str, Any]) -> LazyFile:
        """Complete the file and open it. Raises as :meth:`StreamWriter.finish` or :class:`LazyFile`."""
        with self._lock:
            self._finished = LazyFile(self.writer.finish(document))
            return self._finished


class Stream:
    """Writes the calls of a running trace as they come; the fields leave memory."""

    def __init__(self, path: str | PathLike[str], trace: TraceData):
        self.path, self.trace = fspath(path), trace
        self.file = GrowingFile(path)
        self.names = Names()
        self.written: dict[int, dict[str, str | None]] = {}

    def add(self, call: Call) -> None:
        """Write one call's fields and drop them: they are read from the file from now on."""
        entries: dict[str, str | None] = {}
        for field, value in list(call.fields.items()):
            entries[field] = None
            tensor = tensor_of(value)
            if tensor is not None:
                name, new = self.names.name(call, field, tensor)
                if new:
                    self.file.writer.add(name, tensor)
                entries[field] = name
                call.fields[field] = InFile(self.file, name)
        if isinstance(call.scale, Tensor):
            name, _ = self.names.name(call, "scale", call.scale)
            self.file.writer.add(name, call.scale)
            entries["scale"] = name
        self.written[id(call)] = entries

    def finish(self) -> None:
        """Complete the file and let the trace read its fields from it."""
        for call in self.trace.calls:
            if id(call) not in self.written:
                self.add(call)
        extra: dict[str, Tensor] = {}
        calls = [call_entry(c, self.written[id(c)], extra, False) for c in self.trace.calls]
        stored = trace_of(self.file.finish(document_of(self.trace, calls, False)), self.path, TraceData)
        for call, on_disk in zip(self.trace.calls, stored.calls, strict=True):
            call.fields = on_disk.fields  # so that nothing of the writer is kept for them
        self.trace.path = self.path

    def close(self) -> None:
        """Remove what is unfinished."""
        self.file.writer.abort()
