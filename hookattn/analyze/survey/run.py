"""A survey: trace a chunk, measure it, write it down, forget it; and go on where the last run stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from ... import checks
from ...errors import InputError, TraceWriteError
from ...models.discovery import make_watch_plan
from ..measures.base import Measure
from .batches import Encode, Value
from .chunking import CorpusShard, as_examples, as_shard, chunks
from .measurer import Measurer, failures_of, sentence
from .parts import FOUND, Parts

if TYPE_CHECKING:
    from pyarrow import Table

_ENOUGH = 64  # examples that fail, and not one that is measured: no more are tried


def survey(
    model: nn.Module,
    examples: Iterable[Value],
    encode: Encode,
    out: str | os.PathLike[str],
    *,
    measures: str | Measure | Iterable[str | Measure],
    batch: int = 16,
    about: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    shard: CorpusShard | str | None = None,
    on_error: str = "raise",
) -> int:
    """Measure every head on every example, in memory for one batch, into one Parquet table.

    The table has one row for each example, head and measure: ``example`` (int64, from 0), ``stack``, ``kind``,
    ``layer``, ``path``, ``step``, ``head``, ``measure``, ``value`` (float64; null where the measure is not defined).

    Killed at any moment, the same call goes on with the batch that it was in.

    Args:
        model: what is traced; without gradients, in the mode that it is in.
        examples: any iterable, read once and never kept.
        encode: from examples to one or more batches, in the same order.
        out: the table's file; if it ends in ``/``, a directory of Parquet files. On a disk, or in a store that fsspec
            knows (``s3://…``).
        measures: names or objects. If statistics make up all of them, no weights are formed.
        batch: how many examples are encoded together.
        about: what else tells this survey from others: the model's name, the files; plain data.
        progress: called with the number of examples done, those of an earlier run first.
        shard: a :class:`CorpusShard`, or its text ``3/64``: only these chunks are measured, and no table is made of the
            parts. All processes that share ``out`` together make it; the call without a shard then finds all parts
            there, makes what is missing, and puts them together.
        on_error: what an example does that the model, or ``encode``, does not take: ``raise``, or ``record``: it has no
            rows, and is listed with its error in ``OUT.failed.jsonl``; of its batch, the others are measured one by
            one, to the bits of ``batch=1``.

    Returns:
        How many examples the table has, or the shard.

    Raises:
        InputError: an example cannot be measured; names it. What was done stays.
        MeasureError: ``out`` is of another survey; there was no example; none could be measured.
        TraceWriteError: a file cannot be written.
    """
    if not isinstance(model, nn.Module):
        make_watch_plan(model)  # says what is wrong with it
    source = as_examples(examples)
    checks.function("encode", encode, "a function from examples to batches")
    batch = checked(out, batch, about, progress)
    own = as_shard(shard)
    measurer = Measurer.of(model, encode, measures, on_error)
    parts = Parts(out, settings(measurer, batch, about))
    parts.shared_by(own.of)
    total, count = measure_shard(measurer, source, parts, batch, own, progress)
    parts.counted(count)
    if shard is None:
        parts.finish(count, strict=on_error == "raise")
    return total


def checked(out: Any, batch: Any, about: Any, progress: Any, say: Any = None) -> int:
    """What every way to run a survey takes, checked; gives ``batch`` as a plain int.

    Raises:
        InputError, SelectionError: one of these is something else.
    """
    checks.path("out", out, TraceWriteError)
    if about is not None:
        checks.one_of("about", about, dict, "plain data by name")
    if progress is not None:
        checks.function("progress", progress, "a function of the number of examples")
    if say is not None:
        checks.function("say", say, "a function of a line")
    return checks.whole("batch", batch, 1)


def settings(measurer: Measurer, batch: int, about: dict[str, Any] | None) -> dict[str, Any]:
    """What tells a survey from others.

    Raises:
        InputError: ``about`` has a name that is the survey's own.
    """
    if FOUND in (about or {}):
        raise InputError(f"about: the name {FOUND!r} is the survey's own; choose another one.")
    return {**(about or {}), "measures": [m.key for m in measurer.measures], "batch": batch}


def measure_shard(
    measurer: Measurer,
    examples: Iterable[Any],
    parts: Parts,
    batch: int,
    shard: CorpusShard,
    progress: Callable[[int], None] | None = None,
) -> tuple[int, int]:
    """Write the parts of a shard that are not there.

    Returns:
        How many examples it has, and how many chunks there are in all.

    Raises:
        InputError, ModelError, TraceWriteError: as :func:`survey`.
    """
    present = parts.present()
    hopeless = Hopeless(parts)
    total = count = 0
    for chunk in chunks(examples, batch, lambda n: shard.has(n) and not parts.complete and n not in present):
        count += 1
        if not shard.has(chunk.number):
            continue
        if not parts.complete and chunk.number not in present:
            parts.of_model(measurer.model_class)
            hopeless.write(chunk.number, measurer.part(chunk.number, chunk.first, chunk.values))
        total += chunk.size
        if progress is not None:
            progress(total)
    hopeless.end()
    return total, count


class Hopeless:
    """Holds back parts without a row until some example was measured: if none can be, it is not the examples' fault,
    and what is mended must find nothing that looks done."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.held: list[tuple[int, Table]] = []
        self.failed = 0
        self.some = False

    def write(self, number: int, table: Table) -> None:
        """A part, now or later.

        Raises:
            InputError: so many examples failed, and none was measured by anybody.
        """
        if self.some or table.num_rows:
            self.measured()
            self.parts.write(number, table)
            return
        self.held.append((number, table))
        self.failed += len(failures_of(table))
        if self.failed >= _ENOUGH:
            self.end()

    def end(self) -> None:
        """Write what is held, if somebody else has measured an example.

        Raises:
            InputError: nobody has.
        """
        if not self.held:
            return
        if not self.parts.has_rows():
            first = failures_of(self.held[0][1])[0]
            raise InputError(
                f"none of {self.failed} examples could be measured; the first one, {first.example}: "
                f"{sentence(first.error)} "
                "Nothing was written."
            )
        self.measured()

    def measured(self) -> None:
        """Somebody has measured an example: write what is held."""
        self.some = True
        for number, table in self.held:
            self.parts.write(number, table)
        self.held = []
