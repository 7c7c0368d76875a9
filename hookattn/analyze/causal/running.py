"""Runs a model on one input many times, each time with other edits: what activation patching and its kin stand on.

A run is one forward in which nothing is recorded. Two things make many of them cheap, both tried on the model before
they are used, and left alone where they do not hold of it:

- several runs are one forward, with the input repeated along the batch and each run's edits on its own entries;
- what the model has done before the first attention that is edited is not done again (:mod:`.prefix`).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ... import api, checks, edit
from ...calls.call import Call
from ...edit.base import Edit
from ...edit.edited_call import EditedCall
from ...edit.where import Where
from ...errors import HookattnError, InputError, MeasureError
from ...printable import printable
from ...recording.forward_inputs import arguments
from ...traces import Trace
from .metric import Metric, batch_parts, checked_metric, metric_value
from .prefix import Exchanged, Prefix, UnknownContent, repeated, tensors_in, with_tensors

# So many positions of all batch entries together go through the model in one forward, where the caller does not say.
# On a CPU longer inputs run no faster together: 512 tokens took 1.1 to 1.3 times as long in fours.
_POSITIONS = {"cpu": 256}
_POSITIONS_ELSEWHERE = 8192
# And no more runs than that.
_MOST = 64
# Of the largest value, how far apart the same output may be when it is computed in another batch.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

Edits = list[Edit]
Entries = tuple[int, ...] | None
"""Batch entries that edits are for; None: all."""


@dataclass
class Job:
    """One run.

    Attributes:
        sites: the calls that are edited, by their place in the base run.
        edits: makes the edits, of some batch entries.
    """

    sites: tuple[int, ...]
    edits: Callable[[Entries], Edits]


class Runner:
    """A model, one input, and a metric.

    Args:
        model: any; it is run without gradients, in the mode that it is in.
        inputs: as :func:`hookattn.trace` takes them.
        metric: of what the model returns.
        capture: fields of the plain run that are needed beside the output.
        batch: how many runs are one forward at most; None: as fits.
        suffix: whether what comes before the first edited attention may be left out.

    Attributes:
        trace: of the plain run.
        value: the metric of it.
        batch: how many runs are one forward at most.
        forwards: how many there were.
        why: they are not made in the ways that are cheaper; empty: they are.

    Raises:
        InputError: the metric returns no scalar; and the errors of :func:`hookattn.trace`.
        MeasureError: an attention runs several times at one place.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        metric: Metric,
        capture: Sequence[str] = (),
        batch: int | None = None,
        suffix: bool = True,
    ):
        self.model, self.metric = model, checked_metric(metric)
        batch = None if batch is None else checks.whole("batch", batch, 1)
        self.args, self.kwargs = arguments(inputs)
        self.forwards = 0
        plain = plain_trace(model, inputs, *capture)
        self.trace, self.output = plain, plain.output
        self.value = self.value_of(plain.output)
        self._paths = [call.site.path for call in plain.calls]
        _check_places(plain)
        self.entries = _entries((*self.args, *self.kwargs.values()))
        why_suffix = self._why_whole() if suffix else "it was not asked for"
        self._prefix = Prefix(model, self._paths) if why_suffix is None else None
        if self._prefix is not None:
            seen = self._prefix.watch(keeps=True)
            self._forward(1, exchanged=seen)
            self._prefix.learn(seen)
        self.batch, why_batch = self._batch(batch)
        if self._prefix is not None:
            why_suffix = self._try_suffix()
        self.why = "; ".join(filter(None, (why_batch, why_suffix)))

    @property
    def notes(self) -> dict[str, Any]:
        """How the runs are made, and why not otherwise, for the ``attrs`` of a table."""
        return {
            "forwards": self.forwards,
            "runs in a forward": self.batch,
            "each begins": "before the first edited layer" if self._prefix is not None else "at the input",
            "why": self.why,
        }

    # What is run

    def values(
        self,
        jobs: Sequence[Job],
        shared: Callable[[int], Edits] | None = None,
        sites: Sequence[int] = (),
        progress: Callable[[int], None] | None = None,
    ) -> list[float]:
        """The metric of each run, in the order of the jobs.

        Args:
            jobs: those that begin at one site are best put together.
            shared: makes edits of all entries, which are done before those of the jobs, for so many runs.
            sites: that these edit.
            progress: called with how many are done.
        """
        found: list[float] = []
        for several, outputs in self.outputs(jobs, shared, sites):
            found += [self.value_of(output) for output in outputs]
            if progress is not None:
                progress(len(found))
            del several, outputs
        return found

    def outputs(
        self, jobs: Sequence[Job], shared: Callable[[int], Edits] | None = None, sites: Sequence[int] = ()
    ) -> Iterator[tuple[Sequence[Job], list[Any]]]:
        """Likewise, what the model returns in each, some runs at a time."""
        for _, group in itertools.groupby(jobs, key=lambda job: min(job.sites)):
            alike = list(group)
            for several in _even(alike, self.batch):
                yield several, self._run(several, shared, sites)

    def _run(self, several: Sequence[Job], shared: Callable[[int], Edits] | None, sites: Sequence[int]) -> list[Any]:
        n = len(several)
        edits = [] if shared is None else shared(n)
        for i, job in enumerate(several):
            entries = None if n == 1 else tuple(range(i * self.entries, (i + 1) * self.entries))
            edits += job.edits(entries)
        first = {self._paths[i] for job in several for i in job.sites} | {self._paths[i] for i in sites}
        output = self._forward(n, edits, None if self._prefix is None else self._prefix.skipped(first, n))
        return [output] if n == 1 else batch_parts(output, n * self.entries, n)

    def _forward(self, times: int, edits: Sequence[Edit] = (), exchanged: Exchanged | None = None) -> Any:
        """One forward of the model, on so many copies of the input, with some modules exchanged."""
        args, kwargs = self._inputs(times)
        self.forwards += 1
        with torch.no_grad():
            if not edits:
                with exchanged or nullcontext():
                    return self.model(*args, **kwargs)
            block = api.unrecorded(self.model, edits)
            try:
                # Inside: a trace puts back what was changed before it began and nobody is known to be at work on.
                with block, exchanged or nullcontext():
                    return self.model(*args, **kwargs)
            finally:
                block.gen.close()  # type: ignore[attr-defined]  # as api._forward does

    def _inputs(self, times: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a forward."""

        def one(x: Any) -> Any:
            return _fresh(x, lambda t: t if times == 1 else self._repeated(t, times))

        return tuple(map(one, self.args)), {name: one(x) for name, x in self.kwargs.items()}

    def _repeated(self, x: Tensor, times: int) -> Tensor:
        return repeated(x, times) if x.dim() and x.shape[0] == self.entries else x

    def repeated(self, x: Tensor, times: int) -> Tensor:
        """A field of the plain run for so many runs in one forward."""
        return repeated(x, times) if times > 1 and x.shape[0] == self.entries else x

    def value_of(self, output: Any) -> float:
        """The metric of what the model has returned."""
        with torch.no_grad():
            return float(metric_value(self.metric, output))

    # Whether the two ways hold of the model

    def _why_whole(self) -> str | None:
        """Why all of the model has to run each time; None: nothing is known against it."""
        if any(module.training for module in self.model.modules()):
            return "whole forwards: the model is in train mode, where a module may return something else each time"
        if len(set(self._paths)) < len(self._paths):
            return "whole forwards: an attention runs several times in one"
        return None

    def _batch(self, wanted: int | None) -> tuple[int, str]:
        """How many runs are one forward, and why they are not several."""
        outputs = [field_of(call, "output") for call in self.trace.calls]
        longest = max(x.shape[2] for x in outputs)
        most = _POSITIONS.get(outputs[0].device.type, _POSITIONS_ELSEWHERE)
        n = min(_MOST, max(1, most // (longest * max(self.entries, 1)))) if wanted is None else wanted
        if n == 1:
            return 1, ""
        why = self._why_single()
        if why is not None:
            return 1, f"one run in a forward: {why}"
        return n, ""

    def _why_single(self) -> str | None:
        if not self.entries:
            return "the inputs have no tensor with an axis of the batch"
        if any(module.training for module in self.model.modules()):
            return "the model is in train mode, where batch entries may depend on each other"
        try:
            for x in (*self.args, *self.kwargs.values()):
                tensors_in(x)
        except UnknownContent as error:
            return f"what an object of {error} in the inputs is for several batch entries is not known"
        if any(field_of(call, "output").shape[0] != self.entries for call in self.trace.calls):
            return "an attention has other batch entries than the inputs"
        shapes: dict[str, list[int]] = {}

        def look(call: EditedCall) -> Tensor:
            shapes.setdefault(call.site.path, []).append(call.extents["B"])
            return call.value

        watch = None if self._prefix is None else self._prefix.watch(keeps=False)
        try:
            # The second half is changed, so that a model in which batch entries look at each other shows.
            other = edit.zero("output", **of_entries(self.where(0), tuple(range(self.entries, 2 * self.entries))))
            doubled = self._forward(2, [edit.call(look, "output"), other], watch)
            first, _ = batch_parts(doubled, 2 * self.entries, 2)
        except HookattnError:
            raise
        except Exception as error:  # noqa: BLE001 - a model may refuse a batch in any way
            return f"the model does not take the input twice over ({type(error).__name__})"
        if any(b != 2 * self.entries for seen in shapes.values() for b in seen):
            return "an attention has other batch entries than the inputs"
        if not _alike(first, self.output):
            return "the model returns something else for an input where there are others in the batch"
        if self._prefix is not None and watch is not None:
            self._prefix.learn_batch(watch)
        return None

    def _try_suffix(self) -> str | None:
        """Run what comes last alone, and see whether the model returns what it did."""
        assert self._prefix is not None
        last = self._prefix.last
        if last is None or not self._prefix.before([last]):
            self._prefix = None
            return "whole forwards: no module ends before an attention begins"
        try:
            output = self._forward(1, exchanged=self._prefix.skipped([last]))
        except Exception:  # noqa: BLE001 - a model may need what was left out in any way
            output = None
        if output is None or not _alike(output, self.output):
            self._prefix = None
            return "whole forwards: the model returns something else where its first layers are not run again"
        return None

    # Where an edit is done

    def where(self, i: int) -> Where:
        """The selection of one call of the plain run."""
        site = self.trace.calls[i].site
        if self._paths.count(site.path) == 1:
            return {"path": site.path}
        return {"path": site.path, "layer": site.layer, "stack": site.stack, "kind": site.kind}


def plain_trace(model: nn.Module, inputs: Any, *capture: str) -> Trace:
    """A run as it is, without gradients, with the outputs of its attention and some more fields."""
    args, kwargs = arguments(inputs)
    given: Any = {name: _fresh(x) for name, x in kwargs.items()} if kwargs else tuple(map(_fresh, args))
    with torch.no_grad():
        return api.trace(model, given, capture=tuple(dict.fromkeys(("output", *capture))))


def _fresh(x: Any, of: Callable[[Tensor], Any] = lambda t: t) -> Any:
    """An argument of a forward. What is no plain data is copied, since a forward may write to it (a cache)."""
    try:
        return with_tensors(x, of)
    except UnknownContent:
        pass
    try:
        return copy.deepcopy(x)
    except Exception as error:
        raise InputError(
            f"the inputs hold an object of {type(x).__name__}, which each run needs a copy of, and which cannot be "
            f"copied ({type(error).__name__}: {error})."
        ) from error


def _check_places(trace: Trace) -> None:
    """Raises MeasureError: an attention ran several times at one place, where none of them can be edited alone."""
    seen: dict[tuple[Any, ...], int] = {}
    for call in trace.calls:
        site = call.site
        place = site.path, site.layer, site.stack, site.kind
        seen[place] = seen.get(place, 0) + 1
    for place, n in seen.items():
        if n > 1:
            raise MeasureError(
                f"{printable(place[0]) or '<model>'} attends {n} times in one forward, and its runs cannot be edited "
                "one by one; an edit of hookattn.edit is of all of them."
            )


def _entries(values: Sequence[Any]) -> int:
    """How many batch entries inputs have: the first axis of their first tensor that has one; 0: there is none."""
    for x in values:
        try:
            found = next((t.shape[0] for t in tensors_in(x) if t.dim()), None)
        except UnknownContent:
            found = None
        if found is not None:
            return found
    return 0


def _alike(output: Any, other: Any) -> bool:
    """Whether two outputs of a model are the same but for rounding, as far as they are tensors."""
    try:
        pairs = list(zip(tensors_in(output), tensors_in(other), strict=True))
    except (UnknownContent, ValueError):
        pairs = [(a, b) for a, b in zip(_some(output), _some(other), strict=False)]
        if not pairs:
            return False
    return all(_close(a, b) for a, b in pairs)


def _some(output: Any) -> list[Tensor]:
    """The tensors right in an output, where something else in it is not to be looked through: a cache, say."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [x for x in values if isinstance(x, Tensor)]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    scale = float(b.abs().nan_to_num(0, 0, 0).max()) if b.numel() else 0.0
    tolerance = _TOLERANCE.get(a.dtype, 3e-2)
    return bool(torch.allclose(a, b, rtol=0, atol=tolerance * max(scale, 1e-30), equal_nan=True))


def _even(jobs: Sequence[Job], most: int) -> Iterator[Sequence[Job]]:
    """Jobs in as few parts as are needed, of one size as far as that goes."""
    parts = -(-len(jobs) // most)
    size = -(-len(jobs) // parts)
    for i in range(0, len(jobs), size):
        yield jobs[i : i + size]


def check_same(base: Trace, source: Trace) -> None:
    """Whether two runs attended alike, so that values of one fit the other.

    Raises:
        InputError: they did not; says where.
    """
    places = [[(c.site.path, c.site.kind) for c in trace.calls] for trace in (base, source)]
    if places[0] != places[1]:
        raise InputError(
            f"the two inputs run {len(places[0])} and {len(places[1])} attention calls, or in other modules; values of "
            "one run have no place in the other."
        )
    for a, b in zip(base.calls, source.calls, strict=True):
        shapes = [list(field_of(c, "output").shape) for c in (a, b)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{a.site.label}: its output is B H T E = {shapes[0]} for the one input and {shapes[1]} for the other; "
                "both have to have as many batch entries and tokens (pad or choose them so)."
            )


def field_of(call: Call, field: str) -> Tensor:
    """A field of the plain run.

    Raises:
        MeasureError: the call has none.
    """
    found = call.get(field)
    if found is None:
        raise MeasureError(f"{call.site.label}: it has no {field}.")
    return found


def of_entries(where: Where, entries: Entries, **more: Unpack[Where]) -> Where:
    """A selection of some batch entries, and what else is selected."""
    return {**where, **more} if entries is None else {**where, **more, "batch": entries}
