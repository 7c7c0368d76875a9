"""One trace of several of one model, over different inputs: :func:`hookattn.concat`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from ..calls.call import Call, Skipped
from ..calls.extents import extents_of
from ..calls.trace_data import TraceData
from ..errors import MergeError
from .joined_call import Part, Whole, count_along, join
from .joined_field import JoinedHistories
from .merge import check_runs, joint_model, joint_notes, joint_skipped, labels_of
from .order import Key

Joined = TypeVar("Joined", bound=TraceData)

DIMS = ("batch", "step")
"""What traces can be put together along."""

_ONE_MODEL = "Concatenate traces of one model, taken with the same arguments."


def concat(traces: Sequence[Joined], dim: str) -> Joined:
    """See :func:`hookattn.concat`.

    Args:
        traces: one or more.
        dim: one of :data:`DIMS`.
    """
    labels = labels_of(traces)
    check_runs(traces, labels, _ONE_MODEL)
    calls = _batches(traces, labels) if dim == "batch" else _steps(traces)
    for i, call in enumerate(calls):
        call.index = i
    notes = joint_notes(traces, labels)
    if len(traces) > 1:
        notes.append(f"put together of {len(traces)} traces, {dim} after {dim}: {', '.join(labels)}")
    versions = [t.model.get("versions") for t in traces if t.model.get("versions")]
    if any(v != versions[0] for v in versions):
        notes.append("they ran with different versions of libraries; those of the first are kept")
    made = replace(
        traces[0],
        calls=calls,
        skipped=joint_skipped(traces) if dim == "batch" else _skipped_in_steps(traces),
        output=None,
        model=joint_model(traces),
        notes=notes,
        selection=dict(traces[0].selection),
        path=None,
        stack_tokens={},
    )
    join_tokens = _of_batches if dim == "batch" else _of_steps
    made.tokens = join_tokens(traces, labels, _Said("tokens", [t.tokens for t in traces]), notes)
    made.segments = join_tokens(traces, labels, _Said("segments", [t.segments for t in traces]), notes)
    for stack in dict.fromkeys(stack for t in traces for stack in t.stack_tokens):
        found = join_tokens(traces, labels, _of_stack(traces, stack), notes)
        if found is not None:
            made.stack_tokens[stack] = found
    return made


class _Said(NamedTuple):
    """What traces say of the positions of each batch entry.

    Attributes:
        what: tokens, or the segments that they are of.
        several: of each trace its lists; None: it says nothing.
        stack: whose tokens they are; None: those of the trace.
    """

    what: str
    several: list[Any]
    stack: str | None = None

    @property
    def attribute(self) -> str:
        """How it is set."""
        return f"trace.{self.what}" if self.stack is None else f"trace.stack_tokens[{self.stack!r}]"


def _of_stack(traces: Sequence[TraceData], stack: str) -> _Said:
    return _Said(f"tokens of the {stack}", [t.stack_tokens.get(stack) for t in traces], stack)


# Step after step


def _numbers(traces: Sequence[TraceData]) -> list[dict[int, int]]:
    """The number in the whole of each step of each trace: in their order, without gaps."""
    found: list[dict[int, int]] = []
    start = 0
    for trace in traces:
        own = sorted({c.step for c in trace.calls} | {step for s in trace.skipped for step in s.steps})
        found.append({step: start + i for i, step in enumerate(own)})
        start += len(own)
    return found


def _steps(traces: Sequence[TraceData]) -> list[Call]:
    made = []
    for trace, number in zip(traces, _numbers(traces), strict=True):
        for call in trace.calls:
            one = replace(call, step=number[call.step])
            one.gradient = call.gradient
            made.append(one)
    return made


def _skipped_in_steps(traces: Sequence[TraceData]) -> list[Skipped]:
    steps: dict[tuple[str, str], list[int]] = {}
    for trace, number in zip(traces, _numbers(traces), strict=True):
        for one in trace.skipped:
            steps.setdefault((one.path, one.reason), []).extend(number[step] for step in one.steps)
    return [Skipped(path, reason, tuple(own)) for (path, reason), own in steps.items()]


def _of_steps(traces: Sequence[TraceData], labels: Sequence[str], said: _Said, notes: list[str]) -> Any:
    """The tokens that all have; None where they have different ones, of which a trace can't say the steps."""
    several = said.several
    i = next((i for i, tokens in enumerate(several) if tokens != several[0]), None)
    if i is None:
        return several[0]
    notes.append(
        f"{labels[0]} and {labels[i]} have different {said.what}, and a trace has a list for each batch entry, not "
        "for each step, so that it has none: set them on trace.select(step=…), which is of one step"
    )
    return None


# Batch entry after batch entry


def _batches(traces: Sequence[TraceData], labels: Sequence[str]) -> list[Call]:
    keyed = [_by_key(trace) for trace in traces]
    for i, calls in enumerate(keyed[1:], 1):
        odd = next((key for key in (*keyed[0], *calls) if key not in calls or key not in keyed[0]), None)
        if odd is not None:
            has, lacks = (labels[0], labels[i]) if odd in keyed[0] else (labels[i], labels[0])
            nth = f", run {odd.number} of it" if odd.number else ""
            raise MergeError(
                f"{odd.path or '<model>'} (step {odd.step}{nth}) ran in {has} and not in {lacks}. Traces whose calls "
                "are not the same go one after the other: hookattn.concat(traces, dim='step')."
            )
    return [_one([calls[key] for calls in keyed], labels) for key in keyed[0]]


def _by_key(trace: TraceData) -> dict[Key, Call]:
    count: dict[tuple[str, int], int] = defaultdict(int)
    found = {}
    for call in trace.calls:
        place = call.site.path, call.step
        found[Key(*place, count[place])] = call
        count[place] += 1
    return found


def _one(calls: Sequence[Call], labels: Sequence[str]) -> Call:
    first = calls[0]
    where = f"{first.site.label} (step {first.step})"
    if len(calls) == 1:
        made = replace(first)
        made.gradient = first.gradient
        return made
    parts, start = [], 0
    for call, label in zip(calls, labels, strict=True):
        if call.shards != first.shards or any(shard.axis == "B" for shard in call.shards):
            raise MergeError(
                f"{where}: {labels[0]} and {label} have different parts of the attention, or parts of a batch. Put the "
                "ranks of each run together first: hookattn.merge."
            )
        n = count_along(call, "B")
        if n is None:
            raise MergeError(f"{where}: nothing that was captured in {label} tells how many batch entries it has.")
        parts.append(Part(call, label, range(start, start + n), range(start, start + n)))
        start += n
    _check_lengths(calls, labels, where)
    made = join(parts, Whole("B", start, None, False, _ONE_MODEL), JoinedHistories())
    made.shards = first.shards
    return made


def _check_lengths(calls: Sequence[Call], labels: Sequence[str], where: str) -> None:
    sizes = [extents_of(call, "TS").known("TS") for call in calls]
    for size, label in zip(sizes[1:], labels[1:], strict=True):
        for letter, what in (("T", "queries"), ("S", "keys")):
            a, b = sizes[0].get(letter), size.get(letter)
            if a is not None and b is not None and a != b:
                raise MergeError(
                    f"{where} has {a} {what} in {labels[0]} and {b} in {label}, and the entries of a batch all have "
                    "as many. Trace the inputs as one padded batch, or put the traces one after the other: "
                    "hookattn.concat(traces, dim='step')."
                )


def _of_batches(traces: Sequence[TraceData], labels: Sequence[str], said: _Said, notes: list[str]) -> Any:
    """The tokens of all batch entries, one list each.

    Raises:
        MergeError: one of the traces has none, or they are of another number of batch entries.
    """
    found: list[list[Any]] = []
    for trace, label, tokens in zip(traces, labels, said.several, strict=True):
        if tokens is None:
            if all(x is None for x in said.several):
                return None
            has = next(other for other, x in zip(labels, said.several, strict=True) if x is not None)
            raise MergeError(f"{has} has {said.what} and {label} has none. Set {said.attribute} of it, or of none.")
        entries = _entries(trace, said.stack)
        if len(tokens) not in (1, entries):
            raise MergeError(f"{label} has {len(tokens)} lists of {said.what} for {entries} batch entries.")
        found += [list(row) for row in (tokens if len(tokens) == entries else tokens * entries)]
    return found


def _entries(trace: TraceData, stack: str | None) -> int:
    """How many batch entries the inputs of a trace had: its calls have as many, or several windows of each."""
    own = [c for c in trace.calls if stack is None or c.site.stack == stack]
    return min((n for c in own or trace.calls if (n := count_along(c, "B")) is not None), default=1)
