"""Whether the tokens that a caller gave are of any sequence that the model read.

How long the sequences are that attend is known when they have attended. Tokens that fit none of them name nothing: that
is told, and the trace is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..calls.call import Call
from ..calls.extents import extents_of
from ..calls.key_tokens import cross_positions, key_positions, lists_of_keys, lists_of_queries
from ..calls.trace_data import TraceData

# So many kinds of calls are looked at: of a long generation that the tokens do not fit, each step is one.
_MOST = 64


def unfit_tokens(trace: TraceData, named: Iterable[str]) -> list[str]:
    """What of given tokens no call can use, and why; a line for each list, none if all is well.

    Args:
        trace: a complete one.
        named: the stacks that tokens were given for; none: they were given for the trace.
    """
    stacks = dict.fromkeys(call.site.stack for call in trace.calls)
    if not stacks:
        return []
    unread = [stack for stack in named if stack not in stacks]
    said = []
    if unread:
        said.append(f"tokens= names {', '.join(unread)}, and the stacks that attended are {', '.join(stacks)}")
    own: list[str | None] = [stack for stack in named if stack in stacks]
    for stack in own or ([] if unread else [None]):
        whose = "" if stack is None else f" for {stack!r}"
        reasons: list[str] = []
        for reason in _reasons(trace, stack):
            if reason is None:
                break
            reasons.append(reason)
        else:
            said.append(f"tokens={whose} fit no call: {reasons[0] if reasons else 'no call reads them'}")
    return said


def _reasons(trace: TraceData, stack: str | None) -> Iterator[str | None]:
    """Of each kind of call why the tokens do not fit; None: they do, or nothing that was kept tells."""
    seen = set()
    for call in trace.calls:
        found = extents_of(call, "BTS")
        kind = (call.site.stack, call.site.kind, call.site.axes, found.b, found.t, found.s)
        if kind in seen:
            continue
        seen.add(kind)
        if len(seen) > _MOST:
            return
        lists = lists_of_keys(call, trace)
        if stack is None or lists is trace.stack_tokens.get(stack):
            yield _misfit(call, trace, lists, found.b, found.s)
        if stack is not None and call.site.crosses and call.site.stack == stack:
            yield _misfit_of_queries(call, trace, found.b, found.t)


def _misfit(call: Call, trace: TraceData, lists: list[list[str]] | str, b: int | None, s: int | None) -> str | None:
    if isinstance(lists, str) or b is None or s is None:
        return lists if isinstance(lists, str) else None
    lengths = {len(row) for row in lists}
    if len(lists) not in (1, b):
        return f"{len(lists)} lists for the {b} batch entries of {call.site.label}"
    at = key_positions(call, trace, s, lengths)
    fits = at is not None and at.start < min(lengths)
    return None if fits else f"lists of {_counts(lengths)} for the {s} keys of {call.site.label}"


def _misfit_of_queries(call: Call, trace: TraceData, b: int | None, t: int | None) -> str | None:
    lists = lists_of_queries(call, trace)
    if isinstance(lists, str) or b is None or t is None:
        return None
    lengths = {len(row) for row in lists}
    if len(lists) not in (1, b):
        return f"{len(lists)} lists for the {b} batch entries of {call.site.label}"
    if cross_positions(call, trace, t, lengths) is not None:
        return None
    return f"lists of {_counts(lengths)} for the {t} queries of {call.site.label}"


def _counts(lengths: Iterable[int]) -> str:
    return " and ".join(map(str, sorted(lengths)))
