"""A survey: trace a chunk, measure it, write it down, forget it; and go on where the last run stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from ... import checks
from ...errors import TraceWriteError
from ...models.discovery import make_watch_plan
from ..measures.base import Measure
from .batches import Encode, Value
from .chunks import CorpusShard, as_shard, chunks
from .measurer import Measurer
from .parts import Parts


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
        out: the table's file.
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
    source = _examples(examples)
    checks.function("encode", encode, "a function from examples to batches")
    checks.path("out", out, TraceWriteError)
    batch = checks.whole("batch", batch, 1)
    if about is not None:
        checks.one_of("about", about, dict, "plain data by name")
    if progress is not None:
        checks.function("progress", progress, "a function of the number of examples")
    own = as_shard(shard)
    measurer = Measurer.of(model, encode, measures, on_error)
    parts = Parts(out, described(measurer, batch, type(model).__name__, about))
    present, total, count = parts.present(), 0, 0
    for chunk in chunks(source, batch):
        count += 1
        if not own.has(chunk.number):
            continue
        if not parts.complete and chunk.number not in present:
            parts.write(chunk.number, measurer.part(chunk.number, chunk.first, chunk.values or []))
        total += chunk.size
        if progress is not None:
            progress(total)
    parts.counted(count)
    if shard is None:
        parts.finish(count)
    return total


def described(measurer: Measurer, batch: int, model: str, about: dict[str, Any] | None) -> dict[str, Any]:
    """What tells a survey from others."""
    return {**(about or {}), "measures": [m.key for m in measurer.measures], "batch": batch, "model": model}


def _examples(given: Any) -> Iterator[Value]:
    """What can be gone through, and is not one text.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(given, (str, bytes)):
        try:
            return iter(given)
        except Exception:  # noqa: BLE001 - said below
            pass
    raise checks.wrong("examples", given, "examples, one after the other, and not one text")
