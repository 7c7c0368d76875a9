"""Labels of the queries and the keys of a call."""

from __future__ import annotations

from collections.abc import Sequence

from ..call import Call
from ..errors import InputError
from ..sequences import of_inputs, stitched
from ..tokens.display import shown
from ..trace import TraceData


def labels(
    trace: TraceData,
    call: Call,
    batch: int,
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
    cross = call.site.crosses
    own_labels = tokens is not None and (cross or key_tokens is not None or len(tokens) != s)
    if key_tokens is None and tokens is not None and not cross:
        key_tokens = tokens if len(tokens) >= s else None
    if key_tokens is None and _are_ours(trace, call, s):
        lists = trace.tokens or []
        key_tokens = lists[batch if len(lists) > 1 else 0]
    numbers = [str(j) for j in range(s)]
    if key_tokens is not None:
        if len(key_tokens) < s:
            raise InputError(f"key_tokens has {len(key_tokens)} labels, and {call.site.label} has {s} keys.")
        numbers = shown(key_tokens)[:s]
    if tokens is not None and own_labels:
        if len(tokens) not in (t, call.of_queries or max(own) + 1):
            raise InputError(f"tokens has {len(tokens)} labels, and {call.site.label} has {t} queries and {s} keys.")
        given = shown(tokens)
        return tuple(given if len(given) == t else [given[i] for i in own]), tuple(numbers)
    # Of more queries than keys, a diagonal goes on where no key is.
    named = own if at is None else [numbers[i] if 0 <= i < s else i for i in at]
    return tuple(map(str, named)), tuple(numbers)


def _are_ours(trace: TraceData, call: Call, s: int) -> bool:
    """Whether the trace's tokens, which are those of the model's input, are the keys of a call."""
    site = call.site
    if not trace.tokens or site.axes != "tokens" or site.stack in ("vision", "audio"):
        return False
    if not of_inputs(call, trace):
        return False
    crosses = any(c.site.crosses for c in trace)
    # Of a generation, the tokens may be those of its end; its last one never was a key.
    grows = not crosses and any(c.step or stitched(c) for c in trace)
    return all(len(row) == s or (grows and len(row) > s) for row in trace.tokens)
