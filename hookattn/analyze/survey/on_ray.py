"""A survey on Ray Data: the table of one process, from actors on any number of machines."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, cast

from ... import checks
from ...errors import InputError, MeasureError
from ...optional import extra_named
from ..measures.base import Measure
from .batches import Value
from .chunking import chunks
from .measurer import Build, Measurer
from .on_ray_workers import COLUMN, Actor, Place, Reader, Told
from .parts import Parts, ranges
from .run import Hopeless, checked, settings

_STORE = 100 << 20
"""Bytes of the object store of a Ray that is started here: only examples and numbers go through it."""
_SEEN_WITHIN = 30.0
"""Seconds until a part that another machine has written has to be seen here; shared folders are read with a delay."""

_MOST = 1000


def survey_on_ray(
    build: Build,
    examples: Iterable[Value],
    out: str | os.PathLike[str],
    *,
    measures: str | Measure | Iterable[str | Measure],
    actors: int = 1,
    gpus_per_actor: float = 0,
    cpus_per_actor: float = 1,
    batch: int = 16,
    about: dict[str, Any] | None = None,
    on_error: str = "raise",
    address: str | None = None,
    retries: int = 3,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> int:
    """:func:`survey` in actors of Ray, each with a model of its own; the table is the same to the last bit.

    That is so on equal devices, with as many threads of torch as an actor has CPUs (at least one). The machines share
    the folder of ``out``: an actor writes its parts there, and only their numbers come back.

    Killed at any moment, the same call goes on with the parts that are missing, and so do :func:`survey` and its
    shards. A process that is lost is replaced, and its chunk measured again.

    Where Ray is initialised it is used as it is, and left so. Else it is started on this machine for as long as this
    takes, or the cluster at ``address`` is joined.

    Args:
        build: what makes ``(model, encode)``, as in :class:`Measurer`: ``module:function``, or a function of no
            argument that can be pickled. It is called once in each actor, which sees its own GPUs alone, as ``cuda``.
        examples: what can be gone through more than once and be pickled, such as a :class:`Corpus` or a list; an
            iterator is read into a list. It is read on this machine.
        out: the table's file.
        measures: names or objects that can be pickled.
        actors: how many there are.
        gpus_per_actor: GPUs of each; a half lets two share one.
        cpus_per_actor: CPUs of each.
        batch: how many examples are encoded together.
        about: what else tells this survey from others: the model's name, the files; plain data.
        on_error: as in :func:`survey`.
        address: of a cluster: ``auto`` for that of this machine, ``HOST:PORT``. None: what the variable ``RAY_ADDRESS``
            says, or a Ray of its own.
        retries: how often a chunk is tried again whose process was lost.
        progress: called with the number of examples done, those of an earlier run first.
        say: called with a line: how many parts are there, a process was lost or has to wait for a machine, and what
            ``build`` writes to stderr.

    Returns:
        How many examples the table has.

    Raises:
        InputError: an example cannot be measured; there are too few GPUs here; no cluster is at ``address``.
        ModelError: the model cannot be built.
        MeasureError: ``out`` is of another survey; there was no example; a chunk's process was lost each time it was
            tried; a machine does not see the folder of ``out``. The parts that are there stay.
        TraceWriteError: a file cannot be written.
        ModuleNotFoundError: Ray is not installed: ``pip install "hookattn[ray]"``.
    """
    source = _again(examples)
    batch = checked(out, batch, about, progress, say)
    actors = checks.whole("actors", actors, 1)
    retries = checks.whole("retries", retries, 0)
    gpus = checks.number("gpus_per_actor", gpus_per_actor, "a number of GPUs, 0 or more", lambda x: 0 <= x <= _MOST)
    cpus = checks.number("cpus_per_actor", cpus_per_actor, "a number of CPUs above 0", lambda x: 0 < x <= _MOST)
    if address is not None:
        checks.text("address", address)
    measurer = Measurer(build, measures, on_error)
    described = settings(measurer, batch, about)
    with extra_named():
        import ray  # noqa: F401 - before anything is written
    # Other processes work elsewhere.
    out = out if "://" in os.fspath(out) else os.path.join(os.getcwd(), out)
    parts = Parts(out, described)
    if parts.complete:
        total = sum(chunk.size for chunk in chunks(source, batch, lambda number: False))
        if progress is not None:
            progress(total)
        return total
    run = _Run(parts, batch, actors, progress, say or (lambda line: None))
    if run.present:
        of = "" if parts.count is None else f" of {parts.count}"
        run.say(f"{len(run.present)}{of} parts are there from an earlier run.")
    reader = Reader(source, batch, run.present, Place.here())
    pickled = (measurer, os.fspath(out), parts.about)
    with (
        _ray(address, actors, cpus, gpus, run.say),
        # Closed before Ray is: what an error leaves open would be closed whenever nobody refers to it any more.
        contextlib.closing(_told(reader, pickled, run, actors, cpus, gpus, retries)) as told,
    ):
        run.follow(told)
    return run.finished(strict=on_error == "raise")


def _again(examples: Any) -> Iterable[Value]:
    """Examples that can be gone through more than once.

    Raises:
        InputError: they are something else.
    """
    if isinstance(examples, Iterator):
        return list(examples)
    if not isinstance(examples, (str, bytes)):
        with contextlib.suppress(Exception):
            iter(examples)
            return cast(Iterable[Value], examples)
    raise checks.wrong("examples", examples, "examples, one after the other, and not one text")


class _Run:
    """What is known of a survey while it goes on."""

    def __init__(
        self,
        parts: Parts,
        batch: int,
        actors: int,
        progress: Callable[[int], None] | None,
        say: Callable[[str], None],
    ) -> None:
        self.parts, self.batch, self.actors, self.say = parts, batch, actors, say
        self.present = frozenset(parts.present())
        self._progress = progress
        self._hopeless = Hopeless(parts)
        self._done: set[int] = set()
        self._ended: Told | None = None
        self._processes: dict[str, int] = {}
        self._hosts: set[str] = set()
        self._lines: set[str] = set()

    def follow(self, told: Iterable[Told]) -> None:
        """Hear what the actors say, until the last of them is done.

        Raises:
            HookattnError: one of them failed.
        """
        seen = self.batch * max(0, len(self.present) - 1)  # the last chunk may be a smaller one
        self._advance(seen)
        for one in told:
            if one.error is not None:
                raise one.error
            if one.last:
                self._ended = one
                continue
            for category, text in one.said:
                warnings.warn(text, category, stacklevel=3)
            for line in one.lines:
                if line not in self._lines:  # each actor builds the same model
                    self._lines.add(line)
                    self.say(line)
            self._look_at(one)
            if one.empty is not None:
                self._hopeless.write(one.number, one.empty)
            else:
                self._hopeless.measured()
            self._done.add(one.number)
            seen += one.size
            self._advance(seen)

    def _advance(self, seen: int) -> None:
        if self._progress is not None:
            self._progress(seen)

    def _look_at(self, one: Told) -> None:
        before = self._processes.setdefault(one.actor, one.process)
        if before != one.process:
            self._processes[one.actor] = one.process
            self.say(f"process {before} on {one.host} was lost while it measured; another one took its place.")
        if one.host not in self._hosts and one.empty is None:
            self._hosts.add(one.host)
            self._await(lambda: one.number in self.parts.present(), one.host)

    def _await(self, is_there: Callable[[], bool], who: str) -> None:
        until = time.monotonic() + _SEEN_WITHIN
        while not is_there():
            if time.monotonic() > until:
                raise MeasureError(
                    f"{self.parts.folder}: {who} has written a part there, which is not to be seen from here. All "
                    "machines have to share this folder, under this name."
                )
            time.sleep(0.2)

    def running(self) -> str:
        """The chunks that may be going on, in words: they are begun in their order, two for each actor."""
        found, number = list[int](), 0
        while len(found) < 2 * self.actors and (self._ended is None or number < self._ended.number):
            if number not in self.present and number not in self._done:
                found.append(number)
            number += 1
        if not found:
            return "the last ones"
        return f"{ranges(found)} (examples {found[0] * self.batch} to {(found[-1] + 1) * self.batch - 1})"

    def finished(self, strict: bool) -> int:
        """Put the parts together.

        Raises:
            MeasureError: parts are missing. TraceWriteError: the table cannot be written.
        """
        if self._ended is None:
            raise MeasureError(
                f"{self.parts.folder}: Ray ended before the examples did. The parts that are there stay."
            )
        self._hopeless.end()
        count, total = self._ended.number, self._ended.size
        self._await(lambda: not self.parts.missing(count), "a machine")
        self.parts.counted(count)
        self.parts.finish(count, strict=strict)
        self._advance(total)
        return total


def _told(
    reader: Reader, pickled: Any, run: _Run, actors: int, cpus: float, gpus: float, retries: int
) -> Generator[Told]:
    """What the actors say, as they say it.

    Raises:
        MeasureError: a process was lost too often.
    """
    import ray
    import ray.data
    from ray import cloudpickle
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Source(Datasource):  # type: ignore[misc, unused-ignore]
        """The reader as one task, whose blocks are measured as they come."""

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            return [ReadTask(reader, BlockMetadata(None, None, None, None))]

    environment = {"env_vars": reader.place.environment()}
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    settings = ray.data.DataContext.get_current().copy()
    settings.enable_progress_bars = settings.print_on_execution_start = False
    # A block is a chunk: what is lost with an actor, and what goes to the next one that is free.
    settings.target_max_block_size, settings.target_min_block_size = 1, 0
    with ray.data.DataContext.current(settings), warnings.catch_warnings():
        # Ray deprecates what bounds the retries, and has no other name for it yet.
        warnings.filterwarnings("ignore", message=".*ray_remote_args")
        data = ray.data.read_datasource(
            Source(), override_num_blocks=1, num_cpus=0, runtime_env=environment, label_selector=here
        ).map_batches(
            Actor, fn_constructor_args=(cloudpickle.dumps(pickled), reader.place, max(1, int(cpus))), batch_size=1,
            batch_format="pyarrow", compute=ray.data.ActorPoolStrategy(size=actors), num_cpus=cpus,
            num_gpus=gpus or None, runtime_env=environment, max_restarts=-1, max_task_retries=retries,
        )  # fmt: skip
        rows = iter(data.iter_rows())
    try:
        for row in rows:
            yield cloudpickle.loads(row[COLUMN])
    except ray.exceptions.RayError as error:
        raise MeasureError(
            f"a process that measures was lost {retries + 1} times: killed, perhaps because memory was short. It was "
            f"at one of the parts {run.running()}. The parts that are there stay: the same survey goes on from them. "
            f"Ray says: {' '.join(str(error).split())[:300]}"
        ) from error
    finally:
        close = getattr(rows, "close", None)
        if close is not None:
            close()


@contextlib.contextmanager
def _ray(address: str | None, actors: int, cpus: float, gpus: float, say: Callable[[str], None]) -> Iterator[None]:
    """Ray, as it is or for as long as the block runs.

    Raises:
        InputError: no cluster answers; this machine has too few GPUs.
        ModuleNotFoundError: it is not installed.
    """
    import ray
    import ray.data  # which sets levels of its loggers

    if ray.is_initialized():
        _check_room(actors, cpus, gpus, say)
        yield
        return
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {}
    if where == "local":
        own = {"num_cpus": math.ceil(actors * cpus), "object_store_memory": _STORE, "include_dashboard": False}
    # What Ray says in the log of its core and of its data is about retries and bars; the files of its session have it.
    quiet = {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_USAGE_STATS_ENABLED": "0"}
    loggers = {name: logging.getLogger(name).level for name in ("ray", "ray.data")}
    with _variables(quiet), _signals():
        try:
            ray.init(where, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"address={where!r}: no cluster of Ray answers there: {str(error).partition(chr(10))[0]} "
                "`ray start --head` starts one."
            ) from error
        try:
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)
            _check_room(actors, cpus, gpus, None if where == "local" else say)
            yield
        finally:
            ray.shutdown()
            for name, level in loggers.items():
                logging.getLogger(name).setLevel(level)


def _check_room(actors: int, cpus: float, gpus: float, say: Callable[[str], None] | None) -> None:
    """Whether there is what the actors need; a cluster may grow, this machine does not."""
    import ray

    there = ray.cluster_resources()
    for name, each, option in (("GPU", gpus, "gpus_per_actor"), ("CPU", cpus, "cpus_per_actor")):
        if each * actors <= there.get(name, 0):
            continue
        text = f"{actors} actors with {option}={each:g} need {each * actors:g} {name}s, and there are "
        if say is None:
            raise InputError(f"{text}{there.get(name, 0):g} on this machine: take fewer actors, or join a cluster.")
        say(f"{text}{there.get(name, 0):g} in the cluster now: some wait for them.")


@contextlib.contextmanager
def _variables(new: Mapping[str, str]) -> Iterator[None]:
    """Variables of the environment, where the user has not set them."""
    mine = {name: value for name, value in new.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Ray takes over the signal that ends a process, and does not give it back."""
    try:
        before = signal.getsignal(signal.SIGTERM)
        yield
    finally:
        with contextlib.suppress(ValueError, TypeError):  # another thread than the main one; a handler of C
            signal.signal(signal.SIGTERM, before)
