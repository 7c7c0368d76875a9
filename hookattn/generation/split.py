"""One trace for each request of a trace of a server, whose batches have several: :meth:`hookattn.Trace.split`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from .. import checks
from ..calls.own_entries import own_entries
from ..errors import SelectionError

if TYPE_CHECKING:
    from ..calls.call import Call, Skipped
    from ..calls.trace_data import TraceData

Label = TypeVar("Label", str, int)
Whole = TypeVar("Whole", bound="TraceData")

_BY = ("request",)
_NAMED = 3


def split(trace: Whole, by: str = "request") -> dict[str, Whole]:
    """See :meth:`hookattn.Trace.split`."""
    checks.word("by", by, _BY)
    if not trace.calls:
        raise SelectionError("the trace has no calls to split.")
    _check_said(trace)
    found: dict[str, list[tuple[Call, tuple[int, ...]]]] = {}
    for call in trace.calls:
        entries: dict[str, list[int]] = {}
        for i, name in enumerate(call.requests or ()):
            entries.setdefault(name, []).append(i)
        for name, own in entries.items():
            found.setdefault(name, []).append((call, tuple(own)))
    made = {}
    for name, places in found.items():
        calls = [(call, part, own) for call, own in places if (part := own_entries(call, own)) is not None]
        if calls:
            made[name] = _one(trace, calls)
    return made


def _check_said(trace: TraceData) -> None:
    """Raises SelectionError: calls say no request, or of other batch entries than they say a length of."""
    silent = [c for c in trace.calls if c.requests is None]
    if silent:
        few = ", ".join(f"{c.site.label} in step {c.step}" for c in silent[:_NAMED])
        more = f" and {len(silent) - _NAMED} more" if len(silent) > _NAMED else ""
        raise SelectionError(
            f"{len(silent)} of {len(trace.calls)} calls do not say whose requests their batch is of: {few}{more}. Run "
            "the model in `with hookattn.serving.requests_of_batch(ids):`, with a name for each batch entry, or set "
            "call.requests; calls that have no batch of requests (of a vision tower, say) are left out first, by "
            "trace.select(…)."
        )
    for call in trace.calls:
        if call.lengths is not None and len(call.lengths) != len(call.requests or ()):
            raise SelectionError(
                f"{call.site.label} in step {call.step} names {len(call.requests or ())} requests and has lengths of "
                f"{len(call.lengths)} batch entries: expected one of each for every entry."
            )


def _one(trace: Whole, calls: Sequence[tuple[Call, Call, tuple[int, ...]]]) -> Whole:
    """The trace of one request.

    Args:
        trace: the whole.
        calls: of the whole those that it takes part in, what is its own of each, and which entries that is.
    """
    steps = {part.step for _, part, _ in calls}
    made = replace(
        trace,
        calls=[replace(part, index=i) for i, (_, part, _) in enumerate(calls)],
        skipped=[one for skipped in trace.skipped if (one := _within(skipped, steps)) is not None],
        output=None,  # of all requests of the last step
        notes=list(trace.notes),
        selection=dict(trace.selection),
        path=None,
    )
    own = [(whole, part, entries) for whole, part, entries in calls if not whole.site.crosses]
    if trace.tokens is not None:
        made.tokens = _tokens(trace.tokens, own or calls)
        if made.tokens is None:
            made.notes.append(_MOVED)
    made.segments = None if trace.segments is None or made.tokens is None else _tokens(trace.segments, own or calls)
    made.stack_tokens = {}
    for stack, lists in trace.stack_tokens.items():
        of_stack = [one for one in own if one[0].site.stack == stack]
        kept = _tokens(lists, of_stack or calls)
        if kept is not None:
            made.stack_tokens[stack] = kept
        elif _MOVED not in made.notes:
            made.notes.append(_MOVED)
    return made


_MOVED = "tokens were given for batch entries, and the request was in several, so that it has none: set trace.tokens"


def _within(skipped: Skipped, steps: set[int]) -> Skipped | None:
    """What was skipped in these steps; None: nothing."""
    own = tuple(step for step in skipped.steps if step in steps)
    return replace(skipped, steps=own) if own else None


def _tokens(lists: list[list[Label]], calls: Sequence[tuple[Call, Call, tuple[int, ...]]]) -> list[list[Label]] | None:
    """Those of the entries of a request, without what fills them up; None: its entries changed from step to step."""
    places = {entries for _, _, entries in calls}
    if len(lists) == 1:
        found = lists
    elif len(places) == 1 and all(len(whole.requests or ()) == len(lists) for whole, _, _ in calls):
        found = [lists[i] for i in next(iter(places))]
    else:
        return None
    longest = max((s for _, part, _ in calls if not part.site.crosses for _, s in part.lengths or ()), default=None)
    return [one[:longest] for one in found]
