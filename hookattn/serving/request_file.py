"""The trace file of one request, written as it is served."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import nn

from ..attention.kernel_call import KernelCall
from ..attention.ragged import entries_alone, lengths_of
from ..calls.call import Skipped
from ..calls.shard import Shard
from ..calls.site import Site
from ..errors import SelectionError
from ..models.description import describe_model
from ..models.discovery import make_watch_plan
from ..recording.recorder import CallRecorder
from ..store.stream import Stream
from ..traces import Trace
from .settings import Settings

_LONGEST = 120  # of a name without what follows it; file systems end at 255 bytes


_taken: set[Path] = set()
"""Where files will be that this process is writing."""


def file_name(request: str) -> str:
    """A name for the files of a request: its own where that is plain, else one that is no path and stays as short.

    Different requests have different names.
    """
    name = quote(request, safe="", errors="surrogatepass")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > _LONGEST:
        digest = hashlib.sha256(request.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        name = f"{name[: _LONGEST - 18].rstrip('%')}%{digest}"
    return name or "%"


def free_path(folder: Path, request: str, rank: int, ending: str) -> Path:
    """Where a file of a request goes: a second request of the same name does not replace the first one's."""
    for n in range(1, 1_000_000):
        again = "" if n == 1 else f"%{n}"
        path = folder / f"{file_name(request)}{again}.rank{rank}{ending}"
        if path not in _taken and not path.exists():
            return path
    raise FileExistsError(f"{folder}: there are a million files of {request!r} already")


def write_error(path: Path, **said: Any) -> None:
    """Put into a file, whole or not at all, why there is no trace."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


class RequestFile:
    """One request while it is recorded.

    Args:
        name: as calls say it.
        shown: as the client knows it, which the file is named by.
        settings: what is recorded of it.
        model: of the process.
        rank: of the process.
        note: what else holds for it.

    Raises:
        TraceWriteError: the file cannot be created.

    Attributes:
        tokens, seconds: recorded so far.
        ended: why it goes on no more; empty: it does.
    """

    def __init__(self, name: str, shown: str, settings: Settings, model: nn.Module, rank: int, *notes: str):
        self.name, self.shown, self.settings, self.rank = name, shown, settings, rank
        self.tokens, self.seconds, self.ended = 0, 0.0, ""
        selection = settings.selection
        plan = make_watch_plan(model)
        about = describe_model(plan.inner, plan.model_class, plan.wrapped_by)
        self.trace = Trace(model=about, selection=selection.to_json(), notes=[*notes])
        self.path = free_path(settings.folder, shown, rank, ".safetensors")
        self._stream = Stream(self.path, self.trace)
        _taken.add(self.path)
        self._recorders: dict[tuple[int, ...] | None, CallRecorder] = {}
        self._begun = 0  # how many calls there were before this step
        self._rows = 0  # of the request in this step

    @property
    def bytes(self) -> int:
        """What was written so far."""
        return self._stream.file.writer.size

    def begin(self, tokens: int) -> None:
        """A step begins, with so many tokens of the request; :attr:`ended` says whether it is recorded."""
        self._begun, self._rows = len(self.trace.calls), tokens
        for recorder in self._recorders.values():
            recorder.forget()
        settings = self.settings
        if self.tokens + tokens > settings.max_tokens:
            self.ended = f"max_tokens={settings.max_tokens} was reached after {self.tokens} tokens"
        elif self.seconds > settings.max_seconds:
            self.ended = f"max_seconds={settings.max_seconds:g} was reached after {self.tokens} tokens"

    def take(self, call: KernelCall, site: Site, step: int, shard: Shard | None) -> None:
        """What is kept of one call of a kernel, of which it may have no entry.

        Raises:
            HookattnError: it cannot be kept.
        """
        entries = [i for i, name in enumerate(call.requests or ()) if name == self.name]
        takes = self.settings.selection.takes_layer(site)
        if takes is None:
            raise SelectionError(f"layers={self.settings.layers}: {site.label} has no layer number.")
        if self.ended or not entries or not takes:
            return
        lengths = lengths_of(call)
        t, s = max(lengths[i][0] for i in entries), max(lengths[i][1] for i in entries)
        recorder = self._recorder(call, shard) if t else None
        if recorder is None:
            return
        heads = call.shape[1]
        made = recorder.keep(entries_alone(call, entries, (t, s)), site, step, len(self.trace.calls))
        if shard is not None and shard.start is not None:
            made.shards = (shard,)
            made.heads = tuple(shard.start + h for h in made.heads or range(heads))
        self.trace.calls.append(made)
        recorder.deliver(made, self._stream.add)
        if self.bytes > self.settings.max_bytes:
            self.ended = f"max_bytes={self.settings.max_bytes} was reached after {self.tokens} tokens"

    def _recorder(self, call: KernelCall, shard: Shard | None) -> CallRecorder | None:
        """The one for the heads of a call; None: none of those that were selected is in this process."""
        selection = self.settings.selection
        own = selection.heads
        if own is not None and shard is not None and shard.start is not None:
            end = shard.start + call.shape[1]
            own = tuple(h - shard.start for h in own if shard.start <= h < end)
            if not own:
                return None
        if own not in self._recorders:
            chosen = replace(selection, heads=own)
            self._recorders[own] = CallRecorder(chosen, self.settings.verify, streamed=True, warns=False)
        return self._recorders[own]

    def end_step(self, seconds: float) -> None:
        """A step has ended; what was recorded of one that passed a bound is dropped, as it may be a part of it."""
        self.seconds += seconds
        if self.ended:
            del self.trace.calls[self._begun :]
        else:
            self.tokens += self._rows

    def skipped(self, found: list[Skipped], step: int) -> None:
        """What was skipped in a step."""
        known = {(s.path, s.reason): s.steps for s in self.trace.skipped}
        for one in found:
            known[one.path, one.reason] = (*known.get((one.path, one.reason), ()), step)
        self.trace.skipped = [Skipped(path, reason, steps) for (path, reason), steps in known.items()]

    def finish(self, note: str = "") -> None:
        """Complete the file, which says why it ends early, if it does.

        Raises:
            TraceWriteError: it cannot be written.
        """
        if note or self.ended:
            self.trace.notes.append(f"recording ended early: {note or self.ended}")
        try:
            for recorder in self._recorders.values():
                recorder.complete(self.trace.calls)
            self._stream.finish()
        except BaseException:
            self.drop()
            raise
        _taken.discard(self.path)

    def fail(self, why: str) -> Path:
        """Give up the trace; what is written in its place says why."""
        self.drop()
        path = free_path(self.settings.folder, self.shown, self.rank, ".error.json")
        write_error(path, request=self.name, rank=self.rank, error=why)
        return path

    def drop(self) -> None:
        """Let go of everything, and leave no file."""
        for recorder in self._recorders.values():
            recorder.drop()
        self._stream.close()
        _taken.discard(self.path)
