"""Statistics of several steps, or of several batches, put together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from .. import checks
from ..calls.edits import AppliedEdit, numbered_together
from ..calls.extents import extents_of, kernel_queries
from ..calls.trace_data import check_trace
from ..errors import StitchError
from ..statistics.received import Received
from ..statistics.registry import STATISTICS
from ..statistics.top_k import TopK

if TYPE_CHECKING:
    from ..calls.call import Call
    from ..calls.trace_data import TraceData

Merged = TypeVar("Merged", bound="TraceData")

# Fields whose values or axes count keys, which have to be the same tokens in all steps.
_OF_KEYS = (Received.name, f"{TopK.name}_keys")


def merge(traces: Merged | Sequence[Merged], over: str = "steps") -> Merged:
    """Put statistics together; all other fields are left out.

    Args:
        traces: over ``"steps"``: one trace, or several that continue one another; over ``"batches"``: several traces of
            the same model, with as many queries and keys each.
        over: ``"steps"``: rows are appended in the order of the steps, and what keys received is summed. Step by
            step the keys have to be the same tokens: a growing cache, or a static one (if ``received`` was captured,
            or from the first step on), or a cross-attention. Rows of beam search, which change places, are not
            followed. ``"batches"``: batch entries are appended.

    Returns:
        A Trace: over steps with one call for each site; over batches with the calls of the first trace.

    Raises:
        StitchError: the calls do not fit together, or have no statistics.
    """
    several: list[Merged] = list(traces) if isinstance(traces, (list, tuple)) else [traces]  # type: ignore[list-item]
    checks.word("over", over, ("steps", "batches"), StitchError)
    for trace in several:
        check_trace(trace, "traces")
    if not any(len(trace) for trace in several):
        raise StitchError("traces: expected at least one trace, with calls.")
    groups: dict[tuple[object, ...], list[Call]] = defaultdict(list)
    for i, trace in enumerate(several):
        count: dict[tuple[object, ...], int] = defaultdict(int)
        for call in trace.calls:
            place = (call.site.path, call.site.kind, call.step)
            part = (call.step,) if over == "batches" else ()
            groups[(*place[:2], count[place], *part)].append(call)
            count[place] += 1
        if over == "batches" and any(len(calls) != i + 1 for calls in groups.values()):
            raise StitchError(f"trace {i} has other calls than the ones before; batches merge call by call.")
    join = _over_steps if over == "steps" else _over_batches
    return replace(several[0], calls=[_merged(calls, i, join) for i, calls in enumerate(groups.values())])


def _edits(calls: Sequence[Call], over_steps: bool) -> tuple[AppliedEdit, ...]:
    """Those of all calls, in the numbers of the rows, or batch entries, that were appended."""
    if not any(c.edits for c in calls):
        return ()
    name, letter = ("queries", "T") if over_steps else ("batch", "B")
    several, start = [], 0
    for call in calls:
        n = (_kernel_rows(call) if over_steps else None) or extents_of(call, letter).known(letter).get(letter, 0)
        several.append((call.edits, partial(_all_of, range(start, start + n)), start))
        start += n
    return numbered_together(name, letter, several, lambda edit: start)


def _all_of(numbers: range, edit: AppliedEdit) -> range:
    return numbers


def _merged(calls: Sequence[Call], index: int, join: Callable[[str, Sequence[Call]], Tensor | None]) -> Call:
    first = calls[0]
    names = [n for n in first.fields if _plain_name(n).removesuffix("_keys") in STATISTICS]
    for call in calls:
        others = [n for n in call.fields if _plain_name(n).removesuffix("_keys") in STATISTICS]
        if others != names or not names:
            raise StitchError(f"{call.site.label} has the statistics {others}, another call of it has {names}.")
        if call.heads != first.heads:
            raise StitchError(f"{call.site.label}: heads {call.heads} here and {first.heads} there.")
    notes = (*dict.fromkeys(n for c in calls for n in c.notes), f"statistics of {len(calls)} calls put together")
    whole = len({c.keys for c in calls}) == 1
    keys = first.keys if whole else None
    made = replace(first, index=index, notes=notes, derivable=(), beside={}, keys=keys, queries=None, of_queries=None)
    made.edits = _edits(calls, join is _over_steps)
    made.fields = {name: join(name, calls) for name in names}
    return made


def _over_steps(name: str, calls: Sequence[Call]) -> Tensor | None:
    parts = [call.get(name) for call in calls]
    given = [x for x in parts if x is not None]
    if len(given) < len(parts):
        return None
    if _plain_name(name) in _OF_KEYS:
        _check_keys(name, calls)
    if _plain_name(name) != Received.name:
        return _appended(name, given, 2, calls)
    out = given[0].new_zeros(*given[0].shape[:2], max(x.shape[2] for x in given))
    for x in given:
        if x.shape[:2] != out.shape[:2]:
            raise StitchError(f"{calls[0].site.label}: {name} is {list(x.shape)} here and {list(out.shape)} there.")
        out[..., : x.shape[2]] += x
    return out


def _over_batches(name: str, calls: Sequence[Call]) -> Tensor | None:
    parts = [call.get(name) for call in calls]
    given = [x for x in parts if x is not None]
    return _appended(name, given, 0, calls) if len(given) == len(parts) else None


def _appended(name: str, parts: Sequence[Tensor], dim: int, calls: Sequence[Call]) -> Tensor:
    shapes = {tuple(n for i, n in enumerate(x.shape) if i != dim) for x in parts}
    if len(shapes) > 1:
        raise StitchError(
            f"{calls[0].site.label}: {name} has the shapes {[list(x.shape) for x in parts][:4]}; to be appended along "
            f"dimension {dim} the others have to be the same."
        )
    return torch.cat(list(parts), dim)


def _check_keys(name: str, calls: Sequence[Call]) -> None:
    """Whether key j is the same token in all steps: there is room for all that were seen so far."""
    if len(calls) == 1:
        return
    site, keys = calls[0].site, [call.keys for call in calls]
    known = [n for n in keys if n is not None]
    if len(known) < len(keys):
        raise StitchError(f"{site.label}: {name} was merged before; merge the traces of all steps at once.")
    if site.crosses:
        if len(set(known)) > 1:
            raise StitchError(f"{site.label}: {name} is of {known[:4]}… keys, which are not the same sequence.")
        return
    # A key keeps its index from step to step only as long as nothing has fallen out of the cache.
    seen = _tokens_among_keys(calls[0], known[0])
    for call, n in zip(calls[1:], known[1:], strict=True):
        t = _kernel_rows(call)
        if seen is None or t is None:
            raise StitchError(f"{site.label}: queries were left out, so which keys {name} counts is not known.")
        seen += t
        if n < seen:
            raise StitchError(
                f"{site.label}: {n} keys in step {call.step}, after {seen} tokens: keys fell out of the cache, and "
                f"{name} counts keys that are not the same tokens in all steps."
            )


def _tokens_among_keys(call: Call, s: int) -> int | None:
    """How many of its S keys are tokens: not the empty end of a static cache, which is hidden from all queries.

    None where the last query, which sees them all, was left out.
    """
    names = [n for n in call.fields if _plain_name(n) == Received.name]
    got = call.get(names[0]) if names else None
    t = _kernel_rows(call)
    if got is None or t == s:
        return s
    if call.queries is not None and (t is None or t - 1 not in call.queries):
        return None
    # What nobody may attend to has received nothing at all, not even rounding.
    used = (got != 0).flatten(0, 1).any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


def _kernel_rows(call: Call) -> int | None:
    """T of a call, before any selection."""
    t = kernel_queries(call)
    return call.certificate.of_rows or None if t is None and call.queries is None else t


def _plain_name(name: str) -> str:
    return name.partition("(")[0]
