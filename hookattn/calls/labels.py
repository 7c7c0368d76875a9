"""Labels of the queries and the keys of a call."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError
from ..tokens.display import shown
from .call import Call
from .key_tokens import cross_positions, key_positions, lists_of_keys, lists_of_queries
from .trace_data import TraceData


def labels(
    trace: TraceData,
    call: Call,
    batch: int,
    b: int,
    t: int,
    s: int,
    at: tuple[int, ...] | None,
    tokens: Sequence[str] | None,
    key_tokens: Sequence[str] | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A label for each query and for each key: given ones, the trace's own where they belong, or the position.

    Raises:
        InputError: the given ones are not as many as the positions.
    """
    own = call.queries or range(t)
    named: Sequence[str | int]
    cross = call.site.crosses
    own_labels = tokens is not None and (cross or key_tokens is not None or len(tokens) != s)
    numbers = [str(j) for j in range(s)]
    if key_tokens is None and tokens is not None and not cross and len(tokens) >= s:
        key_tokens = tokens
    if key_tokens is None:
        numbers = _own(trace, call, batch, b, s) or numbers
    else:
        if len(key_tokens) < s:
            raise InputError(f"key_tokens has {len(key_tokens)} labels, and {call.site.label} has {s} keys.")
        # Of a sequence that grows, its first keys; of any other there are no more keys than these.
        if len(key_tokens) > s and key_positions(call, trace, s, [len(key_tokens)]) is None:
            name = "tokens" if key_tokens is tokens else "key_tokens"
            more = _one_more(len(key_tokens), s)
            raise InputError(f"{name} has {len(key_tokens)} labels, and {call.site.label} has {s} keys{more}.")
        numbers = shown(key_tokens)[:s]
    if tokens is not None and own_labels:
        if len(tokens) not in (t, call.of_queries or max(own) + 1):
            more = _one_more(len(tokens), call.of_queries or max(own) + 1)
            raise InputError(
                f"tokens has {len(tokens)} labels, and {call.site.label} has {t} queries and {s} keys{more}."
            )
        given = shown(tokens)
        return tuple(given if len(given) == t else [given[i] for i in own]), tuple(numbers)
    # Of more queries than keys, a diagonal goes on where no key is.
    if at is None:
        named = _of_queries(trace, call, batch, b, t) or own
    else:
        named = [numbers[i] if 0 <= i < s else i for i in at]
    return tuple(map(str, named)), tuple(numbers)


def _one_more(labels: int, positions: int) -> str:
    """What may have gone wrong where there is one label too many."""
    said = "; the last token that a generation makes is never a query: drop it, as tokens[:-1]"
    return said if labels == positions + 1 else ""


def _of_queries(trace: TraceData, call: Call, batch: int, b: int, t: int) -> list[str] | None:
    """T: the tokens of the queries of cross-attention, where they were given for its stack."""
    lists = lists_of_queries(call, trace) if call.site.crosses else ""
    if isinstance(lists, str) or len(lists) not in (1, b):
        return None
    at = cross_positions(call, trace, t, {len(row) for row in lists})
    if at is None:
        return None
    names = shown(lists[batch if len(lists) > 1 else 0])
    return [names[i] if i < len(names) else str(i) for i in at]


def _own(trace: TraceData, call: Call, batch: int, b: int, s: int) -> list[str] | None:
    """S: the trace's own tokens where they are of the keys, with positions behind their end; None: they are not."""
    lists = lists_of_keys(call, trace)
    if isinstance(lists, str) or len(lists) not in (1, b):
        return None
    at = key_positions(call, trace, s, {len(row) for row in lists})
    if at is None or at.start >= len(lists[0]):
        return None
    names = shown(lists[batch if len(lists) > 1 else 0])
    return [names[i] if i < len(names) else str(i) for i in at]
