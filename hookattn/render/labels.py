"""Labels of the queries and the keys of a call, and at which key each query is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..call import Call
from ..errors import InputError
from ..sequences import of_inputs, stitched
from ..statistics.positions import last_allowed
from ..trace import Trace
from .tokens import shown


def places(call: Call, batch: int, t: int, s: int) -> tuple[int, ...] | None:
    """T, the key position of each query; None where queries and keys are not places in one sequence."""
    if call.site.crosses:
        return None
    own = call.queries or tuple(range(t))
    if call.queries is None and t == s:
        return own
    if call.has("mask") and (t > 1 or call.step):
        last = last_allowed(call.mask, torch.tensor(own), s)
        if last is not None:
            return tuple(last[batch if len(last) > 1 else 0].tolist())
    if call.queries is None and t > s:
        return None
    return own if call.queries is not None else tuple(i + s - t for i in own)


def labels(
    trace: Trace,
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
        if len(tokens) not in (t, max(own) + 1):
            raise InputError(f"tokens has {len(tokens)} labels, and {call.site.label} has {t} queries and {s} keys.")
        given = shown(tokens)
        return tuple(given if len(given) == t else [given[i] for i in own]), tuple(numbers)
    return tuple(str(i) for i in own) if at is None else tuple(numbers[i] for i in at), tuple(numbers)


def _are_ours(trace: Trace, call: Call, s: int) -> bool:
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
