"""A Trace that is written while the model runs, call by call."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any

import torch
from torch import Size, Tensor

from ..calls.call import Call
from ..calls.extents import extents_of
from ..calls.fields import Field, InFile, Later
from ..calls.key_history import Continued, KeyHistories
from ..calls.shard import Shard
from ..calls.site import Site
from ..calls.trace_data import TraceData
from ..errors import TraceFileError, TraceWriteError
from ..torch_internals.isolation import isolated
from .call_writer import CallWriter, WrittenCall
from .document import call_entry, document_of
from .indexing import Index
from .links import LINKED
from .ranks import claim, other_name, rank_path
from .reader import LazyFile
from .restore import trace_of
from .stored_history import StoredHistory
from .writer import StreamWriter

_ANY = torch.empty(0)


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
        """One tensor, read anew. Raises as :meth:`slice`."""
        return self.slice(name, ())

    def slice(self, name: str, index: Index) -> Tensor:
        """A part of a tensor, read anew. Raises as :meth:`StreamWriter.slice` or :meth:`LazyFile.slice`."""
        with self._lock:  # between the writer's end and the opening of the finished file nobody could read
            return (self.writer if self._finished is None else self._finished).slice(name, index)

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


@dataclass(eq=False)
class _Keys:
    """The keys and values of a call, for the next step to be compared with.

    Attributes:
        site, step: of the call.
        fields: in memory where they go on from others, so that there is one run of them a site; else in the file.
        number: of the call, from 0.
        stored: what the call's fields are in the file.
    """

    site: Site
    step: int
    fields: dict[str, Field]
    number: int = 0
    stored: dict[str, Field] = field(default_factory=dict)


class Stream:
    """Writes the calls of a running trace as they come; the fields leave memory, but for one run of keys a site.

    Args:
        path: the file.
        trace: what it is of.
        in_parts: whether this process may have a part of each attention, and others the rest: then it is known when the
            model has run which name its file has.

    Raises:
        TraceWriteError: it cannot be written there.
    """

    def __init__(self, path: str | PathLike[str], trace: TraceData, in_parts: bool = False):
        if not in_parts:
            claim(path)
        self.path, self.trace, self._claimed = fspath(path), trace, not in_parts
        self.file = GrowingFile(path)
        self.written: dict[int, WrittenCall] = {}
        self._writer = CallWriter(self.file.writer)
        self._histories = KeyHistories()
        # Of each site the step that it ran in last, what it had then, and what it had in the one before.
        self._last: dict[tuple[str, str], tuple[int, list[_Keys], list[_Keys]]] = {}

    def add(self, call: Call) -> None:
        """Write one call's fields and drop them: they are read from the file from now on."""
        with isolated(_ANY):
            keys, before = self._compared(call)
            written = self.written[id(call)] = self._writer.write(call)
        keys.number = written.number
        for name, tensor in written.fields.items():
            if tensor is not None:
                call.fields[name] = InFile(self.file, tensor)
        for name, link in written.links.items():
            earlier = next(k for k in before if k.number == link.continues)
            place = earlier.stored[name]
            if isinstance(place, InFile):
                place = Continued(StoredHistory(place.file, place.name), 0)
            assert isinstance(place, Continued) and isinstance(place.history, StoredHistory)
            place.history.add(link.batch, link.dropped, link.at, link.tensor)
            call.fields[name] = Continued(place.history, place.step + 1)
        for name, place in keys.fields.items():
            stored = keys.stored[name] = call.fields[name]
            if not isinstance(place, Continued):
                assert isinstance(stored, InFile)
                keys.fields[name] = Later(self.file.tensor, stored.name)

    def _compared(self, call: Call) -> tuple[_Keys, list[_Keys]]:
        """The keys and values of a call, which has them as steps of a history now where they go on from those of its
        site in the step before; and all of these."""
        place = call.site.path, call.site.kind
        step, now, before = self._last.get(place, (-1, [], []))
        if call.step != step:
            now, before = [], now if call.step > step else []
        keys = _Keys(call.site, call.step, {f: x for f in LINKED if isinstance(x := call.fields.get(f), Tensor)})
        if not _may_go_on(call):
            before = []
        self._last[place] = call.step, [*now, keys], before
        self._histories.take(keys)
        for name, found in keys.fields.items():
            if isinstance(found, Continued):
                call.fields[name] = found
                if found.step == 1:  # what it goes on from was written before anybody knew
                    first = next(k for k in before if k.fields.get(name) == Continued(found.history, 0))
                    self._writer.steps.whole(Continued(found.history, 0), first.number)
        return keys, before

    def finish(self, shards: Sequence[Sequence[Shard]] = ()) -> None:
        """Complete the file and let the trace read its fields from it.

        In a fork of the process that opened it nothing is done to the file, which that process goes on writing.

        Args:
            shards: the parts that this process had of what ran; with any, the file's name says its rank.

        Raises:
            TraceWriteError: it cannot be written; or another process of the group writes this name, and then the trace
                is in a file that the message names.
        """
        if self.file.writer.foreign:
            self.close()
            return
        refused = self._take_name(shards)
        for call in self.trace.calls:
            if id(call) not in self.written:
                self.add(call)
            elif self.written[id(call)].gradient is None:  # it came after the call was written
                self.written[id(call)] = self._writer.write_gradient(call, self.written[id(call)])
        places = {self.written[id(c)].number: i for i, c in enumerate(self.trace.calls)}
        calls = [call_entry(c, self.written[id(c)], c.certificate, places) for c in self.trace.calls]
        stored = trace_of(self.file.finish(document_of(self.trace, calls, False)), self.path, TraceData)
        for call, on_disk in zip(self.trace.calls, stored.calls, strict=True):
            call.fields = on_disk.fields  # so that nothing of the writer is kept for them
        self.trace.path = self.path
        if refused:
            raise TraceWriteError(f"{refused} This trace is in {self.path}.")

    def _take_name(self, shards: Sequence[Sequence[Shard]]) -> str:
        """Give the file the name of this process; why it could not have the one it was to have, or empty."""
        if self._claimed:
            return ""
        own, refused = rank_path(self.path, shards), ""
        if own is None:
            try:
                claim(self.path)
            except TraceWriteError as error:  # what was traced is not lost for it
                own, refused = other_name(self.path), str(error)
        if own is not None:
            claim(own)
            self.file.writer.rename(own)
            self.path = fspath(own)
            # The same on all ranks, so that what is merged of them says it once.
            several = re.sub(r"\.rank\d+-of-", ".rank*-of-", own.name)
            self.trace.notes.append(f"several processes have each written a part of the attention, to {several}")
        self._claimed = True
        return refused

    def close(self) -> None:
        """Remove what is unfinished; in a fork of the process that opened the file it is let go alone."""
        self.file.writer.abort()


def _may_go_on(call: Call) -> bool:
    """Whether a call may have keys of a step before; a sequence that has a query for every key has none."""
    known = extents_of(call, "TS")
    return call.site.crosses or known.t is None or known.s is None or known.t < known.s
