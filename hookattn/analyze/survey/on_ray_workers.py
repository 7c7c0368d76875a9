"""What of a survey runs in Ray's processes: one that reads the examples, and actors that each hold a model.

Nothing large is handed about: a chunk of examples goes in, its number comes out, and the part is on the disk.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...errors import HookattnError, MeasureError
from .chunking import Chunk, chunks
from .measurer import Measurer
from .parts import Parts

if TYPE_CHECKING:
    from pyarrow import Table

COLUMN = "pickled"
"""The one column of what goes in and comes out, one row for a chunk. Bytes, so that Ray need not understand it."""


@dataclass(frozen=True)
class Told:
    """What an actor says of a chunk.

    Attributes:
        number: the chunk's. Of the end of the examples, it is how many chunks there are.
        size: how many examples it has. Of the end, it is how many there are in all.
        last: whether this is the end.
        empty: the part where it has no row; it is not written yet, since perhaps none of all can be measured.
        host, actor, process: who says so.
        said: warnings that came up, kind and text.
        lines: what was written to stderr as the model was built.
        error: why it is not measured.
    """

    number: int
    size: int
    last: bool = False
    empty: Table | None = None
    host: str = ""
    actor: str = ""
    process: int = 0
    said: tuple[tuple[type[Warning], str], ...] = ()
    lines: tuple[str, ...] = ()
    error: Exception | None = None


@dataclass(frozen=True)
class Place:
    """Where the caller works, so that modules and relative paths mean the same in another process.

    Attributes:
        folder: the current one.
        modules: where modules are looked for.
    """

    folder: str
    modules: tuple[str, ...]

    @classmethod
    def here(cls) -> Place:
        """This process's."""
        installed = tuple({os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, sys.exec_prefix)})
        own = [p for p in map(os.path.abspath, sys.path) if not os.path.realpath(p).startswith(installed)]
        return cls(os.getcwd(), tuple(dict.fromkeys([os.getcwd(), *own])))

    def environment(self) -> dict[str, str]:
        """As variables of a process that begins: what is looked for first has to be there before anything is."""
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        return {"PYTHONPATH": os.pathsep.join(dict.fromkeys([*self.modules, *filter(None, given)]))}

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Work there. A machine that has no such folder goes on where it is."""
        before = os.getcwd()
        with suppress(OSError):
            os.chdir(self.folder)
        try:
            yield
        finally:
            with suppress(OSError):
                os.chdir(before)


@dataclass(frozen=True)
class Reader:
    """Reads the examples and cuts them into chunks; read again, these are the same.

    Attributes:
        examples: what is gone through.
        batch: how many make a chunk.
        present: the numbers of those that are measured already.
        place: where paths are of.
    """

    examples: Iterable[Any]
    batch: int
    present: frozenset[int]
    place: Place

    def __call__(self) -> Iterator[Table]:
        """A block for each chunk that is missing, and one for the end; what cannot be read is told in its place."""
        import pyarrow as pa
        from ray import cloudpickle

        def block(content: Chunk | Told) -> Table:
            return pa.table({COLUMN: pa.array([cloudpickle.dumps(content)], pa.binary())})

        number = total = 0
        with self.place.entered():
            try:
                for chunk in chunks(self.examples, self.batch, lambda n: n not in self.present):
                    number, total = chunk.number + 1, chunk.first + chunk.size
                    if chunk.number not in self.present:
                        yield block(chunk)
            except Exception as error:  # noqa: BLE001 - told to the caller, who raises it
                yield block(Told(number, total, error=portable(error)))
                return
        yield block(Told(number, total, last=True))


class Actor:
    """One process that measures. The model is built for its first chunk, so that a death on the way counts as a try.

    Args:
        pickled: the :class:`Measurer`, the table's name, and what it is of.
        place: where the caller works.
        threads: of torch, for the last bits depend on them.
    """

    def __init__(self, pickled: bytes, place: Place, threads: int) -> None:
        import ray

        self._pickled, self._place, self._threads = pickled, place, threads
        self._name = ray.get_runtime_context().get_actor_id() or ""
        self._ready: tuple[Measurer, Parts] | None = None
        self._lines: tuple[str, ...] = ()

    def __call__(self, table: Table) -> Table:
        """What became of each chunk."""
        import pyarrow as pa
        from ray import cloudpickle

        told = [cloudpickle.dumps(self._done(cloudpickle.loads(row))) for row in table[COLUMN].to_pylist()]
        return pa.table({COLUMN: pa.array(told, pa.binary())})

    def _done(self, content: Chunk | Told) -> Told:
        if isinstance(content, Told):
            return content
        tell = partial(
            Told, content.number, content.size, host=socket.gethostname(), actor=self._name, process=os.getpid()
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with self._place.entered():
                    measurer, parts = self._prepared()
                    part = measurer.part(content.number, content.first, content.values)
                    if part.num_rows:
                        parts.write(content.number, part)
            except Exception as error:  # noqa: BLE001 - told to the caller, who raises it
                return tell(error=portable(error))
        own = [w for w in caught if w.category.__module__.partition(".")[0] == __name__.partition(".")[0]]
        said = tuple(dict.fromkeys((w.category, str(w.message)) for w in own))
        lines, self._lines = self._lines, ()
        return tell(empty=None if part.num_rows else part, said=said, lines=lines)

    def _prepared(self) -> tuple[Measurer, Parts]:
        if self._ready is None:
            from ray import cloudpickle

            torch.set_num_threads(self._threads)
            sys.path[:0] = [one for one in self._place.modules if one not in sys.path]
            measurer, out, about = cloudpickle.loads(self._pickled)
            try:
                parts = Parts(out, about, begin=False)
            except MeasureError as error:
                raise MeasureError(
                    f"{error} All machines have to see the folder of the table under this name; {socket.gethostname()} "
                    "does not."
                ) from error
            with redirect_stderr(io.StringIO()) as heard:
                parts.of_model(measurer.model_class)
            self._lines = tuple(line for line in heard.getvalue().split("\n") if line.strip() and "\r" not in line)
            self._ready = measurer, parts
        return self._ready


def portable(error: Exception) -> Exception:
    """An error that can go to another process, with where it was raised as a note."""
    trace = "".join(traceback.format_exception(error))
    made: Exception
    try:
        made = pickle.loads(pickle.dumps(error))
        if type(made) is not type(error) or str(made) != str(error):
            raise TypeError
    except Exception:  # noqa: BLE001 - an exception of whatever class, which cannot be taken apart and put together
        made = HookattnError(f"{type(error).__name__}: {error}")
    made.add_note(f"raised in a process of Ray on {socket.gethostname()}:\n{trace}")
    return made
