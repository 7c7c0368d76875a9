"""A survey on several processes of one machine: each measures a shard, and the table is made when all have ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ... import checks
from ...errors import HookattnError, HookattnWarning, InputError, MeasureError
from ...torch_internals.devices import visible_gpus
from ..measures.base import Measure
from .batches import Value
from .chunking import CorpusShard, as_examples, as_shard, chunks
from .measurer import Build, Measurer
from .parts import Parts
from .run import checked, measure_shard, settings

_PATIENCE = 5.0  # seconds that a process has to end itself


@dataclass(frozen=True)
class _Order:
    """What a process is to do; pickled."""

    measurer: Measurer
    examples: Iterable[Value]
    out: str
    about: dict[str, Any]
    batch: int
    shard: CorpusShard
    threads: int
    gpu: str | None
    first: bool


def survey_on_processes(
    build: Build,
    examples: Iterable[Value],
    out: str | os.PathLike[str],
    *,
    jobs: int,
    measures: str | Measure | Iterable[str | Measure],
    batch: int = 16,
    about: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    shard: CorpusShard | str | None = None,
    on_error: str = "raise",
    say: Callable[[str], None] | None = None,
) -> int:
    """:func:`survey` on several processes of this machine, each with a model of its own; the same table, bit by bit.

    The threads of torch are divided among the processes, and so are the GPUs. One that is killed, or fails, is told,
    and the others go on; the same call then makes what is missing. Where this process ends, all end.

    Args:
        build: what makes ``(model, encode)``; as :class:`Measurer` takes it.
        examples: a :class:`Corpus`, or what can be pickled; each process goes through all of it.
        jobs: how many processes.
        say: called with a line when a process is lost.
        out, measures, batch, about, progress, shard, on_error: as :func:`survey` takes them.

    Returns:
        How many examples the table has, or the shard.

    Raises:
        InputError, ModelError: of a process. MeasureError: processes were lost; else as :func:`survey`.
        TraceWriteError: a file cannot be written.
    """
    jobs = checks.whole("jobs", jobs, 1)
    batch = checked(out, batch, about, progress, say)
    as_examples(examples)
    own = as_shard(shard)
    measurer = Measurer(build, measures, on_error)
    described = settings(measurer, batch, about)
    parts = Parts(out, described)
    parts.shared_by(own.of)
    if parts.complete:
        own_sizes = [chunk.size for chunk in chunks(examples, batch, lambda number: False) if own.has(chunk.number)]
        return sum(own_sizes)
    # The chunks i of n are, for each j, the chunks i + n·j of n·jobs.
    shards = [CorpusShard(own.index + own.of * j, own.of * jobs) for j in range(jobs)]
    gpus = visible_gpus()
    orders = [
        _Order(
            measurer, examples, os.fspath(out), described, batch, each, max(1, torch.get_num_threads() // jobs),
            gpus[j % len(gpus)] if gpus else None, j == 0,
        )
        for j, each in enumerate(shards)
    ]  # fmt: skip
    try:
        pickle.dumps(orders[0])
    except Exception as error:
        raise InputError(
            f"build={checks.printed(build)} and the examples have to be pickled, for the processes that measure, and "
            f"cannot be: {error}"
        ) from error
    total, count = _Jobs(orders, progress, say).run()
    parts.counted(count)
    if shard is None:
        parts.finish(count, strict=on_error == "raise")
    return total


class _Jobs:
    """The processes, and what is heard of them."""

    def __init__(
        self, orders: list[_Order], progress: Callable[[int], None] | None, say: Callable[[str], None] | None
    ) -> None:
        self.orders, self.progress, self.say = orders, progress, say or (lambda line: None)
        self.done = [0] * len(orders)
        self.totals: list[tuple[int, int] | None] = [None] * len(orders)
        self.errors: dict[int, HookattnError] = {}
        self.lost: list[str] = []
        self.said: set[tuple[type[Warning], str]] = set()

    def run(self) -> tuple[int, int]:
        """How many examples were measured, and how many chunks there are.

        Raises:
            HookattnError: of the first process that failed, after the others have ended.
        """
        # A forked child would have torch's threads without the threads.
        context = multiprocessing.get_context("spawn")
        started: list[tuple[Any, Connection]] = []
        try:
            for order in self.orders:
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(order, there), daemon=True)
                process.start()
                there.close()
                started.append((process, here))
            self._listen(dict(enumerate(started)))
        finally:
            _end([process for process, _ in started])
        if self.errors:
            raise next(iter(self.errors.values()))
        if self.lost:
            raise MeasureError(f"{'; '.join(self.lost)}. What is done stays: the same command goes on from there.")
        known = [total for total in self.totals if total is not None]
        return sum(own for own, _ in known), known[0][1]

    def _listen(self, open_: dict[int, tuple[Any, Connection]]) -> None:
        while open_:
            ready = wait([pipe for _, pipe in open_.values()])
            for number, (process, pipe) in list(open_.items()):
                if pipe not in ready:
                    continue
                try:
                    self._heard(number, *pipe.recv())
                except (EOFError, OSError):
                    process.join()
                    del open_[number]
                    self._ended(number, process.exitcode)

    def _heard(self, number: int, kind: str, told: Any) -> None:
        if kind == "done":
            self.done[number] = told
            if self.progress is not None:
                self.progress(sum(self.done))
        elif kind == "total":
            self.totals[number] = told
        elif kind == "warning":
            if told not in self.said:  # each process goes through all examples
                self.said.add(told)
                category, text = told
                warnings.warn(text, category, stacklevel=2)
        else:
            self.errors[number] = told
            self.say(f"job {number + 1} of {len(self.orders)} failed; the others go on.")

    def _ended(self, number: int, code: int | None) -> None:
        if self.totals[number] is not None or number in self.errors:
            return
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        line = f"job {number + 1} of {len(self.orders)} {how}"
        self.lost.append(line)
        self.say(f"{line}; the others go on.")


def _end(processes: list[Any]) -> None:
    """End what still runs. Interrupted, it is done all the same."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(_PATIENCE)
        if process.is_alive():
            process.kill()


def _work(order: _Order, pipe: Connection) -> None:
    """What a process does."""
    # The parent is told by the terminal as well, and ends all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if order.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = order.gpu
    if not order.first:  # what loading a model says need not be said by each
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    torch.set_num_threads(order.threads)
    shown = warnings.showwarning

    def relay(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        if issubclass(category, HookattnWarning):
            pipe.send(("warning", (category, str(message))))
        else:
            shown(message, category, *where, **options)

    warnings.showwarning = relay
    try:
        parts = Parts(order.out, order.about)
        told = measure_shard(
            order.measurer, order.examples, parts, order.batch, order.shard, lambda n: pipe.send(("done", n))
        )
        pipe.send(("total", told))
    except HookattnError as error:
        pipe.send(("error", error))
    except Exception as error:  # noqa: BLE001 - it is the parent's to tell
        pipe.send(("error", InputError(f"{type(error).__name__}: {error}")))
    pipe.close()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        with contextlib.suppress(OSError):
            parent.join()
        os._exit(1)
