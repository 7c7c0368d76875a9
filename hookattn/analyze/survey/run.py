"""A survey: trace a batch, measure it, write it down, forget it; and go on where the last run stopped."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import api, checks
from ...attention.kernel_call import DERIVED, SOURCES
from ...errors import HookattnError, InputError, TraceWriteError
from ...models.discovery import make_watch_plan
from ...models.wrappers import inside_all, own_class
from ...recording.forward_inputs import token_lists
from ..call_view import View, as_real
from ..measures.base import Measure
from ..reading import Reading
from ..registry import capture as capture_of
from ..registry import resolve
from ..table import readings
from .corpus import Value
from .parts import Parts

if TYPE_CHECKING:
    from pyarrow import Table

    from ...calls.call import Call
    from ...traces import Trace


@dataclass
class Batch:
    """Examples that go through the model together.

    Attributes:
        inputs: as :func:`hookattn.trace` takes them.
        count: how many examples these are, B.
        tokens: one list of strings for each, where there are any.
        real: B S, an ``attention_mask``; None: there is no padding.

    Raises:
        InputError, MeasureError: one of these is something else.
    """

    inputs: Any
    count: int
    tokens: list[list[str]] | None = None
    real: Tensor | None = None

    def __post_init__(self) -> None:
        self.count = checks.whole("Batch: count", self.count, 1, error=InputError)
        if self.tokens is not None:
            self.tokens = token_lists(self.tokens)
        self.real = as_real(self.real)


Encode = Callable[[Sequence[Value]], Iterable[Batch]]


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

    Returns:
        How many examples the table has.

    Raises:
        InputError: the model cannot take an example; names it. What was done stays.
        MeasureError: ``out`` is of another survey; there was no example.
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
    chosen = resolve(measures)
    described = {
        **(about or {}),
        "measures": [m.key for m in chosen],
        "batch": batch,
        "model": own_class(inside_all(model)).__name__,
    }
    parts = Parts(out, described)
    total = 0
    skip = None if parts.complete else parts.done
    wanted = _Capture(chosen)
    for number, values in enumerate(_batches_of(source, batch)):
        if skip is not None and number >= skip:
            parts.write(_measured_table(model, encode(values), total, len(values), chosen, wanted))
        total += len(values)
        if progress is not None:
            progress(total)
    if not parts.complete:
        parts.finish()
    return total


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


def _batches_of(source: Iterator[Value], batch: int) -> Iterator[list[Value]]:
    while values := list(itertools.islice(source, batch)):
        yield values


def _measured_table(
    model: nn.Module, batches: Iterable[Batch], first: int, count: int, measures: Sequence[Measure], wanted: _Capture
) -> Table:
    import pyarrow as pa

    tables, seen = [], first
    for batch in checks.several("encode", batches, Batch, "a function that returns several Batch"):
        try:
            trace = wanted.trace(model, batch)
        except HookattnError:
            raise
        except Exception as error:
            raise InputError(
                f"the model does not take the examples {seen} to {seen + batch.count - 1}: "
                f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            ) from error
        for call in trace.calls:
            view = _padded_view(call, trace, batch.real)
            tables.append(_example_table(view, seen, batch.count, readings(view, measures, missing=True)))
        seen += batch.count
    if seen - first != count:
        raise InputError(f"encode gave {seen - first} examples for {count}.")
    return pa.concat_tables(tables)


def _padded_view(call: Call, trace: Trace, real: Tensor | None) -> View:
    """A call with its padding, where that is of its keys; else its mask has to tell."""
    view = View(call, trace)
    padding = real is not None and view.of_inputs and real.shape[1] == view.shape[3]
    return View(call, trace, real) if padding else view


class _Capture:
    """What is captured: statistics where they are enough; else what weights are derived of, one call at a time."""

    def __init__(self, measures: Sequence[Measure]) -> None:
        self.whole = capture_of(*measures)
        lean = [y for x in self.whole for y in (SOURCES if x in DERIVED else (x,))]
        self.lean = tuple(dict.fromkeys(lean))

    def trace(self, model: nn.Module, batch: Batch) -> Trace:
        """A batch, traced without gradients."""
        with torch.no_grad():
            found = api.trace(model, batch.inputs, capture=self.lean, tokens=batch.tokens)
            if self.lean == self.whole or all(c.has(x) for c in found for x in self.whole if isinstance(x, str)):
                return found
            self.lean = self.whole  # the model forms scores of its own, which cannot be derived
            return api.trace(model, batch.inputs, capture=self.lean, tokens=batch.tokens)


def _example_table(view: View, first: int, count: int, found: dict[str, Reading | None]) -> Table:
    """Example, then head, then measure."""
    import numpy as np
    import pyarrow as pa

    b, h, _, _ = view.shape
    if b != count:
        raise InputError(f"{view.where}: has {b} batch entries for {count} examples, which cannot be told apart.")
    keys, site = list(found), view.call.site
    # Columns are made of numbers and of codes into a few words, as a survey has millions of rows.
    missing = torch.full((b, h), torch.nan, dtype=torch.float64)
    values = torch.stack([missing if r is None else r.value.double().cpu() for r in found.values()], -1)
    n = values.numel()

    def same(value: Any, kind: Any) -> Any:
        return pa.array([value], kind).take(pa.array(np.zeros(n, np.int64)))

    def word(values: list[str], at: Any) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(at.astype(np.int32)), pa.array(values, pa.string()))

    zeros = np.zeros(n, np.int64)
    columns = {
        "example": pa.array(np.repeat(np.arange(first, first + b), h * len(keys))),
        "stack": word([site.stack], zeros),
        "kind": word([site.kind], zeros),
        "layer": same(site.layer, pa.int32()),
        "path": word([site.path], zeros),
        "step": same(view.call.step, pa.int32()),
        "head": pa.array(np.tile(np.repeat(np.array(view.heads, np.int32), len(keys)), b)),
        "measure": word(keys, np.tile(np.arange(len(keys)), b * h)),
        "value": pa.array(values.flatten().numpy(), from_pandas=True),
    }
    return pa.table(columns)
