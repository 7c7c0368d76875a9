"""One trace of those that the ranks of a sharded run have written."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ..calls.call import Call, Skipped
from ..calls.extents import extents_of
from ..calls.fields import InFile
from ..calls.trace_data import TraceData
from ..errors import MergeError
from ..store.ranks import rank_in, rank_names
from .batches import steps_as_batches
from .common import same
from .joined_field import JoinedHistories
from .order import Key, in_order
from .shards import Held, Missing, Run, places_of, whole_call

Merged = TypeVar("Merged", bound=TraceData)
Label = TypeVar("Label", str, int)

_OTHER_RUN = "These are of different runs: merge the files that one run has written."


def merge(traces: Sequence[Merged], *, batches: bool = False) -> Merged:
    """See :func:`hookattn.merge`.

    Args:
        traces: of the ranks, in any order.
        batches: whether the steps of each site become one, batch entry after batch entry.
    """
    labels = labels_of(traces)
    _check_distinct(traces, labels)
    if not any(trace.calls for trace in traces):
        raise MergeError(f"{', '.join(labels)}: expected traces of attention calls, and there are none.")
    check_runs(traces, labels, _OTHER_RUN)
    if batches and len(traces) == 1 and not any(c.shards for c in traces[0].calls):
        calls = traces[0].calls
    else:
        calls = _calls(traces, labels)
    if batches:
        calls = steps_as_batches(calls)
    for i, call in enumerate(calls):
        call.index = i
    first = traces[0]
    return replace(
        first,
        calls=calls,
        skipped=joint_skipped(traces),
        tokens=_tokens([t.tokens for t in traces], labels, traces, calls),
        stack_tokens=_stack_tokens(traces, labels, calls),
        segments=_tokens([t.segments for t in traces], labels, traces, calls, what="segments"),
        output=None,
        model=joint_model(traces),
        notes=[*joint_notes(traces, labels), *_notes(traces, labels, calls)],
        path=None,
    )


def labels_of(traces: Sequence[TraceData]) -> list[str]:
    """What messages call each of several traces."""
    return [f"trace {i}" if t.path is None else os.path.basename(t.path) for i, t in enumerate(traces)]


# Whether they are of one run


def _check_distinct(traces: Sequence[TraceData], labels: Sequence[str]) -> None:
    seen: dict[object, int] = {}
    for i, trace in enumerate(traces):
        key: object = id(trace) if trace.path is None else os.path.realpath(trace.path)
        if key in seen:
            raise MergeError(f"{labels[i]} is there twice, as {seen[key]} and {i} of the traces. Merge each rank once.")
        seen[key] = i


def check_runs(traces: Sequence[TraceData], labels: Sequence[str], advice: str) -> None:
    """That model, selection and format agree, as far as a trace says any.

    Args:
        traces: several.
        labels: what messages call each.
        advice: what to do where they do not agree.

    Raises:
        MergeError: they do not; names what, and where.
    """
    for what, found in (
        ("the model's class", [t.model.get("class") for t in traces]),
        ("the model's configuration", [_comparable(t.model.get("config")) for t in traces]),
        ("what was selected", [_comparable(dict(t.selection)) for t in traces]),
        ("the version of the format", [_format(t) for t in traces]),
    ):
        told = [(label, x) for label, x in zip(labels, found, strict=True) if x is not None]
        for label, x in told[1:]:
            if x != told[0][1]:
                differ = _difference(told[0][1], x)
                raise MergeError(f"{what} differs: {differ[0]} in {told[0][0]} and {differ[1]} in {label}. {advice}")


def _comparable(x: Any) -> Any:
    """Plain data of memory like that of a file."""
    if isinstance(x, Mapping):
        return {str(k): _comparable(v) for k, v in x.items() if k != "shard"}
    if isinstance(x, (list, tuple)):
        return [_comparable(v) for v in x]
    return x


def _difference(one: Any, other: Any) -> tuple[str, str]:
    """The first values that differ, in a few words."""
    if isinstance(one, dict) and isinstance(other, dict):
        key = next(k for k in (*one, *other) if one.get(k) != other.get(k))
        found = _difference(one.get(key), other.get(key))
        return f"{key} {found[0]}", f"{key} {found[1]}"
    return repr(one)[:80], repr(other)[:80]


def _format(trace: TraceData) -> Any:
    """The version of the format of the file that a trace is in; None: it is in memory."""
    if trace.path is None:
        return None
    places = (place for call in trace.calls for place in call.fields.values())
    document = next((getattr(p.file, "document", None) for p in places if isinstance(p, InFile)), None)
    return None if document is None else document["format_version"]


# The calls


def _calls(traces: Sequence[TraceData], labels: Sequence[str]) -> list[Call]:
    groups: dict[Key, list[Held]] = {}
    of_ranks: list[list[Key]] = []
    for trace, label in zip(traces, labels, strict=True):
        count: dict[tuple[str, int], int] = defaultdict(int)
        keys = []
        for call in trace.calls:
            place = call.site.path, call.step
            key = Key(*place, count[place])
            count[place] += 1
            keys.append(key)
            if () not in (call.heads, call.queries):  # else it has none of those that were selected
                groups.setdefault(key, []).append(Held(call, label))
        of_ranks.append(keys)
    missing = _missing_files(traces)
    _check_files(traces, missing, _selection(traces))
    _check_anything(groups, of_ranks, labels)
    _check_whole_calls(groups, of_ranks, labels)
    ranks = [(label, _places(trace)) for trace, label in zip(traces, labels, strict=True)]
    run = Run(_selection(traces), JoinedHistories(), Missing([*missing.values()], ranks))
    calls = {key: _one(held, run) for key, held in groups.items()}
    return in_order(calls, [[key for key in keys if key in calls] for keys in of_ranks])


def _places(trace: TraceData) -> frozenset[tuple[str, str, int]]:
    return frozenset(place for call in trace.calls for place in places_of(call))


def _selection(traces: Sequence[TraceData]) -> Mapping[str, Any]:
    return next((t.selection for t in traces if t.selection), {})


def _one(held: Sequence[Held], run: Run) -> Call:
    """The call that a site made in one step."""
    if any(h.call.shards for h in held):
        return whole_call(held, run)
    first, label = held[0]
    for other, its_label in held[1:]:  # each rank has computed all of it
        _check_copy(first, label, other, its_label)
    made = replace(first)
    made.gradient = first.gradient
    return made


def _check_copy(one: Call, label: str, other: Call, its_label: str) -> None:
    where = f"{one.site.label} (step {one.step})"
    if [*one.fields] != [*other.fields] or extents_of(one) != extents_of(other) or one.tap != other.tap:
        raise MergeError(f"{where} is another call in {label} than in {its_label}. {_OTHER_RUN}")
    for name, place in one.fields.items():
        its_place = other.fields[name]
        if not _same_field(place, its_place):
            raise MergeError(
                f"{where} is whole in {label} and in {its_label}, and its {name} differ. {_OTHER_RUN} (Ranks that hold "
                "other batches say so with a Shard('B', …) in call.shards.)"
            )


def _same_field(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if one is None or other is None:
        return False
    derived = [not callable(x) and not hasattr(x, "shape") for x in (one, other)]
    return all(derived) if any(derived) else same(one, other)


def _check_anything(groups: Mapping[Key, list[Held]], of_ranks: Sequence[list[Key]], labels: Sequence[str]) -> None:
    """That there is something to put together: parts of calls, or the sites of stages."""
    if any(h.call.shards for held in groups.values() for h in held):
        return
    if len(of_ranks) == 1:
        raise MergeError(
            f"{labels[0]} has the whole of every call, so that there is nothing to merge. (steps='batches' puts the "
            "steps of a trace together.)"
        )
    key, held = next(((k, held) for k, held in groups.items() if len(held) > 1), (None, []))
    if key is not None:
        raise MergeError(
            f"nothing is sharded: {held[0].label} and {held[1].label} both have the whole of "
            f"{held[0].call.site.label} (step {key.step}). Of ranks that ran the same, one file is all; those that "
            "hold other batches say so with a Shard('B', …) in call.shards; hookattn.statistics.merge(over='batches') "
            "puts statistics of several runs together."
        )


def _check_whole_calls(groups: Mapping[Key, list[Held]], of_ranks: Sequence[list[Key]], labels: Sequence[str]) -> None:
    """That ranks which have a call in common have all calls in common that are not cut, and that all stages have run
    the same steps.

    Raises:
        MergeError: they have not.
    """
    stage = list(range(len(labels)))  # of each rank one rank of its stage
    number = {label: i for i, label in enumerate(labels)}

    def root(i: int) -> int:
        while stage[i] != i:
            i = stage[i]
        return i

    for held in groups.values():
        for h in held[1:]:
            stage[root(number[h.label])] = root(number[held[0].label])
    for key, held in groups.items():
        if held[0].call.shards:
            continue
        there = {number[h.label] for h in held}
        stages = {root(i) for i in there}
        other = next((i for i in range(len(labels)) if root(i) in stages and i not in there and of_ranks[i]), None)
        if other is not None:
            raise MergeError(
                f"{key.path or '<model>'} (step {key.step}) is in {held[0].label} and not in {labels[other]}. "
                f"{_OTHER_RUN}"
            )
    steps: dict[int, set[int]] = defaultdict(set)
    for i, keys in enumerate(of_ranks):
        steps[root(i)] |= {key.step for key in keys}
    found = [(i, s) for i, s in steps.items() if s]
    for i, own in found[1:]:
        if own != found[0][1]:
            odd = sorted(own ^ found[0][1])[0]
            has, lacks = (i, found[0][0]) if odd in own else (found[0][0], i)
            raise MergeError(
                f"step {odd} is in {labels[has]} and not in {labels[lacks]}, which have other layers. The stages of "
                "one run have the same steps."
            )


def _missing_files(traces: Sequence[TraceData]) -> dict[int, str]:
    """The files that have to be beside those that are there, by the numbers of their ranks, as the names say."""
    named = [None if trace.path is None else rank_in(os.path.basename(trace.path)) for trace in traces]
    there = {name.rank for name in named if name is not None}
    runs = {None if name is None else (name.path, name.of) for name in named}
    run = runs.pop()
    if run is None or runs:
        return {}
    return {i: name for i, name in enumerate(rank_names(*run)) if i not in there}


def _check_files(traces: Sequence[TraceData], files: Mapping[int, str], selection: Mapping[str, Any]) -> None:
    """That the files of all ranks are there which the names of the others speak of. Ranks that have none of the heads
    or queries that were selected need none.

    Raises:
        MergeError: one is missing.
    """
    if not files or selection.get("heads") is not None or selection.get("queries") is not None:
        return
    count = len(files) + len(traces)
    numbers = ", ".join(map(str, files))
    are = f"ranks {numbers} of {count} are" if len(files) > 1 else f"rank {numbers} of {count} is"
    raise MergeError(f"{are} missing: {', '.join(files.values())}. Merge the files of all ranks.")


# What is said of the whole


def joint_skipped(traces: Sequence[TraceData]) -> list[Skipped]:
    """What was skipped in any of several traces, once each."""
    steps: dict[tuple[str, str], set[int]] = {}
    for trace in traces:
        for skipped in trace.skipped:
            steps.setdefault((skipped.path, skipped.reason), set()).update(skipped.steps)
    return [Skipped(path, reason, tuple(sorted(own))) for (path, reason), own in steps.items()]


def _tokens(
    of_ranks: Sequence[list[list[Label]] | None],
    labels: Sequence[str],
    traces: Sequence[TraceData],
    calls: Sequence[Call],
    what: str = "tokens",
) -> list[list[Label]] | None:
    """The tokens of all batch entries, or their segments.

    Raises:
        MergeError: they are of different inputs.
    """
    given = [(t, label, trace) for t, label, trace in zip(of_ranks, labels, traces, strict=True) if t is not None]
    if not given:
        return None
    entries: dict[int, tuple[list[list[Label]], str]] = {}
    for tokens, label, trace in given:
        start = _first_entry(trace, len(tokens))
        known, whose = entries.setdefault(start, (tokens, label))
        if known != tokens:
            differ = next((i for i, (a, b) in enumerate(zip(known, tokens, strict=False)) if a != b), 0)
            raise MergeError(
                f"the {what} of batch entry {start + differ} differ between {whose} and {label}. {_OTHER_RUN}"
            )
    return [row for start in sorted(entries) for row in entries[start][0]]


def _first_entry(trace: TraceData, count: int) -> int:
    """The number in the whole of the first batch entry of a rank's tokens; 0: it has all, or they are all there."""
    for call in trace.calls:
        for shard in call.shards:
            if shard.axis == "B" and shard.start is not None and extents_of(call, "B").b == count != shard.of:
                return shard.start
    return 0


def _stack_tokens(
    traces: Sequence[TraceData], labels: Sequence[str], calls: Sequence[Call]
) -> dict[str, list[list[str]]]:
    stacks = dict.fromkeys(stack for t in traces for stack in t.stack_tokens)
    found = {s: _tokens([t.stack_tokens.get(s) for t in traces], labels, traces, calls) for s in stacks}
    return {stack: tokens for stack, tokens in found.items() if tokens is not None}


def joint_model(traces: Sequence[TraceData]) -> Mapping[str, Any]:
    """What the first of them says of the model that says anything."""
    return next((t.model for t in traces if t.model), {})


def joint_notes(traces: Sequence[TraceData], labels: Sequence[str]) -> list[str]:
    """The notes of all traces, once each; with the trace where not all have it."""
    every = [note for note in traces[0].notes if all(note in t.notes for t in traces)]
    own = [f"{label}: {n}" for label, t in zip(labels, traces, strict=True) for n in t.notes if n not in every]
    return [*dict.fromkeys((*every, *own))]


def _notes(traces: Sequence[TraceData], labels: Sequence[str], calls: Sequence[Call]) -> Iterable[str]:
    if len(traces) > 1:
        yield f"merged of {len(traces)} traces: {', '.join(labels)}"
    versions = [t.model.get("versions") for t in traces if t.model.get("versions")]
    if any(v != versions[0] for v in versions):
        yield "the ranks ran with different versions of libraries; those of the first are kept"
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
    layers: dict[tuple[str, str], int] = defaultdict(int)
    for call in calls:
        if call.site.layer is not None:
            place = call.site.stack, call.site.kind
            numbers[place].add(call.site.layer)
            layers[place] = max(layers[place], call.site.layers or 0)
    if len(traces) > 1 and _selection(traces).get("layers") is None:
        for place, there in numbers.items():
            lacking = [i for i in range(layers[place]) if i not in there]
            if lacking:
                which = f"{place[0]} {place[1]}"
                yield f"no trace has a call of layers {', '.join(map(str, lacking[:8]))} of {layers[place]} ({which})"
