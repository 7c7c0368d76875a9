"""Records the requests of a server that ask for it, step by step, and leaves all others alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from logging import Logger
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..attention.kernel_call import KernelCall
from ..attention.masks import split_additive
from ..calls.call import Call
from ..calls.shard import Shard
from ..calls.site import Site
from ..calls.trace_data import TraceData
from ..models.discovery import make_watch_plan
from ..recording.selection import Selection
from ..recording.session import Session, Sink
from ..taps.batch import requests_of_batch
from .request_file import RequestFile, free_path, write_error
from .settings import Settings

ShardOf = Callable[[KernelCall], Shard | None]


class _PerRequest:
    """Hands each call of a step to the requests that it has entries of (a :class:`~.session.Recorder`).

    Args:
        files: those that are recorded in this step.
        step: its number.
        shard_of: which part of the model's attention this process has.
        failed: takes a file and what has happened to it.
    """

    def __init__(
        self,
        files: Sequence[RequestFile],
        step: int,
        shard_of: ShardOf,
        failed: Callable[[RequestFile, Exception], None],
    ):
        self._files, self._step, self._shard_of, self._failed = files, step, shard_of, failed
        self.taken = 0

    def wants(self, field: str) -> bool:
        """Whether a field was asked for by any."""
        return any(field in file.settings.selection.capture for file in self._files)

    def split(self, additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Bias and mask of an additive mask."""
        return split_additive(additive)

    def forget(self) -> None:
        """Each file does that itself."""

    def keep(self, call: KernelCall, site: Site, step: int, index: int) -> Call | None:
        """Nothing is kept here."""
        self.taken += 1
        for file in self._files:
            try:
                file.take(call, site, self._step, self._shard_of(call))
            except Exception as error:  # noqa: BLE001 - whatever it is, the model goes on, and the request is told
                self._failed(file, error)
        return None

    def deliver(self, call: Call, sink: Sink) -> None:
        """There is none."""

    def complete(self, calls: Sequence[Call]) -> None:
        """Each file does that itself."""

    def drop(self) -> None:
        """Nothing waits here."""


class _Step(Session):
    """A trace of one step, which raises nothing into the model.

    Attributes:
        broken: takes what was raised.
    """

    broken: Callable[[Exception], None]

    def record(self, call: KernelCall) -> None:
        """Take one call."""
        try:
            super().record(call)
        except Exception as error:  # noqa: BLE001 - the model goes on
            self.broken(error)


class RequestTracer:
    """The requests of one process that are recorded.

    Args:
        settings: what is recorded, and within which bounds.
        rank: of the process, which its files are named by.
        log: hears of what could not be done.
        shard_of: which part of the model's attention a kernel's call has; None: the whole.
        refused: why nothing can be recorded here; every request that asks is told. Empty: it can.

    Attributes:
        step: the number of the step that runs, from 0.
    """

    def __init__(self, settings: Settings, rank: int, log: Logger, shard_of: ShardOf | None = None, refused: str = ""):
        self.settings, self.rank, self.refused = settings, rank, refused
        self.step = -1
        self._log, self._shard_of = log, shard_of or (lambda call: None)
        self._open: dict[str, RequestFile] = {}
        self._known: set[str] = set()  # that run, of those which ask
        self._bytes = 0  # of files that are finished
        settings.folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        """How many are being recorded."""
        return len(self._open)

    # Which requests

    def begin(self, name: str, shown: str, asked: Any, model: nn.Module, *notes: str) -> None:
        """A request begins; it is recorded if it asks for it. Nothing is raised for what it asks.

        Args:
            name: as calls will say it.
            shown: as the client knows it; its file is named by this.
            asked: what it says: True, False, None, or its own settings, which may be text in JSON.
            model: that runs.
            notes: what holds for its file.
        """
        if name in self._known or not self._asks(shown, asked):  # one that was preempted begins again
            return
        self._known.add(name)
        try:
            if self.refused:
                raise _RefusedError(self.refused)
            if self.bytes >= self.settings.max_bytes_in_all:
                raise _RefusedError(f"max_bytes_in_all={self.settings.max_bytes_in_all} is reached by other requests")
            own = self.settings.of_request(_options(asked))
            said = () if name == shown else (f"the request is {shown!r} to its client",)
            self._open[name] = RequestFile(name, shown, own, model, self.rank, *said, *notes)
        except Exception as error:  # noqa: BLE001 - the request is served all the same
            self._refuse(name, shown, error)

    def _asks(self, shown: str, asked: Any) -> bool:
        if asked is None:
            return bool(self.settings.prefix) and shown.startswith(self.settings.prefix)
        return asked not in (False, 0, "", "0", "false", "False", "null")

    def _refuse(self, name: str, shown: str, error: Exception) -> None:
        why = str(error) if isinstance(error, _RefusedError) else f"{type(error).__name__}: {error}"
        self._log.error("hookattn: request %r is not recorded: %s", name, why)
        self._tell(
            lambda: write_error(
                free_path(self.settings.folder, shown, self.rank, ".error.json"),
                request=name,
                rank=self.rank,
                error=why,
            )
        )

    def _tell(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            self._log.error("hookattn: and this could not be written: %s", error)

    @property
    def bytes(self) -> int:
        """Of all files so far."""
        return self._bytes + sum(file.bytes for file in self._open.values())

    # One step

    @contextmanager
    def running(
        self,
        model: nn.Module,
        tokens: Mapping[str, int],
        names: Callable[[], Sequence[str]] | None,
    ) -> Iterator[None]:
        """What runs in the block is one step of the model. Where no request of it is recorded, it costs a look.

        Args:
            model: that runs.
            tokens: how many tokens of each request are in the step.
            names: gives the request of each batch entry; None: a tap knows it.
        """
        self.step += 1
        files = [file for name, file in self._open.items() if name in tokens] if self._open else []
        for file in files:
            file.begin(tokens[file.name])
        files = [file for file in files if not self._ended(file)]
        if not files:
            yield
            return
        began = time.perf_counter()
        recorder = _PerRequest(files, self.step, self._shard_of, self._fail)
        session = self._session(model, recorder, files)
        only = {file.name for file in files}
        try:
            if session is None or names is None:
                yield
            else:
                with requests_of_batch(names, only):
                    yield
        finally:
            self._end(session, recorder, files, time.perf_counter() - began)

    def _session(self, model: nn.Module, recorder: _PerRequest, files: Sequence[RequestFile]) -> _Step | None:
        """A trace that is attached; None: none could be, and the requests are told."""
        session: _Step | None = None
        try:
            session = _Step(make_watch_plan(model), TraceData(), _EVERYTHING, recorder, False)
            session.broken = lambda error: self._fail_all(files, error)
            session.start()
        except Exception as error:  # noqa: BLE001 - the model runs all the same
            self._fail_all(files, error)
            if session is not None:
                with suppress(Exception):  # which was told
                    session.close()
            return None
        return session

    def _end(self, session: _Step | None, recorder: _PerRequest, files: Sequence[RequestFile], seconds: float) -> None:
        if session is None:
            return
        trace = session.trace
        for part in (session.stop, session.finish, session.close):
            try:
                part()
            except Exception as error:  # noqa: BLE001 - the model has run
                self._fail_all(files, error)
        for file in files:
            if self._open.get(file.name) is not file:
                continue
            file.end_step(seconds)
            file.skipped(trace.skipped, self.step)
            if not recorder.taken and not file.trace.calls:
                reasons = "; ".join(f"{s.path}: {s.reason}" for s in trace.skipped[:3]) or "no attention was seen"
                self._fail(file, _RefusedError(f"no attention of this model can be read: {reasons}"))
            elif not self._ended(file) and self.bytes > self.settings.max_bytes_in_all:
                file.ended = f"max_bytes_in_all={self.settings.max_bytes_in_all} was reached"
                self._ended(file)

    # How a request ends

    def finished(self, names: Collection[str]) -> None:
        """Requests that run no more: their files are completed."""
        if not self._known:
            return
        for name in names:
            self._known.discard(name)
            if name in self._open:
                self._finish(self._open[name])

    def close(self, note: str = "the server ended before the request did") -> None:
        """Complete what is open."""
        for file in list(self._open.values()):
            self._finish(file, note)

    def _ended(self, file: RequestFile) -> bool:
        """Whether a file is at a bound, and so complete."""
        if file.ended and self._open.get(file.name) is file:
            self._log.warning("hookattn: request %r: %s; its file ends here", file.name, file.ended)
            self._finish(file)
        return bool(file.ended)

    def _finish(self, file: RequestFile, note: str = "") -> None:
        self._open.pop(file.name, None)
        try:
            file.finish(note)
            self._bytes += file.path.stat().st_size
        except Exception as error:  # noqa: BLE001 - the server goes on
            self._failed(file, error)

    def _fail(self, file: RequestFile, error: Exception) -> None:
        if self._open.pop(file.name, None) is not None:
            self._failed(file, error)

    def _fail_all(self, files: Sequence[RequestFile], error: Exception) -> None:
        for file in files:
            self._fail(file, error)

    def _failed(self, file: RequestFile, error: Exception) -> None:
        file.ended = f"{type(error).__name__}: {error}" if not isinstance(error, _RefusedError) else str(error)
        trouble = None if isinstance(error, _RefusedError) else error
        self._log.error("hookattn: request %r is not recorded: %s", file.name, file.ended, exc_info=trouble)
        self._tell(lambda: file.fail(file.ended))


_EVERYTHING = Selection.of()
"""Of a session of several requests: each takes what it has asked for."""


class _RefusedError(Exception):
    """A request that is not recorded, for a reason that needs no name of an error. Never leaves this module."""


def _options(asked: Any) -> Mapping[str, Any]:
    """A request's own settings.

    Raises:
        InputError: what it says are none.
    """
    if isinstance(asked, str) and asked not in ("true", "True", "1"):
        try:
            asked = json.loads(asked)
        except ValueError:
            raise checks.wrong("hookattn", asked, "true, or settings as an object of JSON") from None
    if asked in (None, True, 1, "true", "True", "1"):
        return {}
    if isinstance(asked, Mapping):
        return asked
    raise checks.wrong("hookattn", asked, "true, or an object of settings")
