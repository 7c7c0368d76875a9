"""Whose tokens the keys of a recorded call are: the one rule that tables, figures and labels follow.

Tokens that were given for a stack (``trace.stack_tokens``) are of the sequence that this stack reads. The tokens of a
trace are those of the text that the model was given: of the encoder, where a decoder reads one, and of the text tower,
where there are several. They name the keys of a call if its keys are that text
(:func:`foreign_keys`) and the list lines up with them (:func:`key_positions`). Where a trace cannot tell, nothing is
named, and a key is known by its number.

The rule asks only for what the header of a trace file holds (sites, steps, notes and extents), because the viewer
follows it too, in ``render/viewer/src/data/keytokens.ts``. ``tests/calls/test_key_tokens.py`` holds both
to the same answers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from .call import Call
from .extents import extents_of, kernel_queries

if TYPE_CHECKING:
    from .site import Site
    from .trace_data import TraceData

NO_TOKENS = "it needs tokens; trace again with tokens=, or set trace.tokens"
_TOGETHER = "put together from "
# Stacks that read no text, whatever their axes are said to count.
_NO_TEXT = frozenset({"vision", "audio"})


def stitching_note(steps: int) -> str:
    """The note of a call that several steps were put together in; a file keeps it."""
    return f"{_TOGETHER}{steps} steps"


def is_stitched(call: Call) -> bool:
    """Whether several steps were put together in a call."""
    return any(note.startswith(_TOGETHER) for note in call.notes)


# ------------------------------------------------------------------------------------- whether the keys are the text


def lists_of_keys(call: Call, trace: TraceData) -> list[list[str]] | str:
    """The token strings that the keys of a call are among, one list for each batch entry or one for all; text: why
    there are none. What was given for the stack whose sequence they are is theirs, before the trace's own tokens."""
    named = trace.stack_tokens
    stack = _stack_of_keys(call.site, named) if named else None
    if stack is not None:
        return named[stack]
    if trace.tokens is None:
        return NO_TOKENS
    return foreign_keys(call, trace) or trace.tokens


def lists_of_queries(call: Call, trace: TraceData) -> list[list[str]] | str:
    """The same of the queries: those of the keys, but in cross-attention, whose queries are of its own stack."""
    if call.site.stack in trace.stack_tokens:
        return trace.stack_tokens[call.site.stack]
    if call.site.crosses:
        return f"it needs tokens of its queries; trace again with tokens={{{call.site.stack!r}: …}}"
    return lists_of_keys(call, trace)


def has_tokens(trace: TraceData) -> bool:
    """Whether a trace has tokens of any stack."""
    return trace.tokens is not None or bool(trace.stack_tokens)


def _stack_of_keys(site: Site, named: Mapping[str, object]) -> str | None:
    """The stack, of those whose tokens were given, whose sequence the keys are; None: none, or nobody knows which."""
    if not site.crosses:
        return site.stack if site.stack in named else None
    others = [stack for stack in named if stack != site.stack]
    if "encoder" in others:
        return "encoder"
    return others[0] if len(others) == 1 else None


def foreign_keys(call: Call, trace: TraceData) -> str | None:
    """Why the keys of a call are not the text that the trace's tokens are of; None: they are, as far as it tells."""
    return _foreign(call.site, _kinds(trace))


def padding_is_of_keys(call: Call, trace: TraceData) -> bool:
    """Whether padding of the inputs (an ``attention_mask``) is of its keys.

    It is of the keys that the tokens are of. A trace that has none of these is taken to be measured with padding of
    its own, as that of the frames of an audio encoder.
    """
    kinds = _kinds(trace)
    return _foreign(call.site, kinds) is None or all(_foreign(site, kinds) is not None for site in kinds.values())


def _kinds(trace: TraceData) -> dict[tuple[str, bool, str], Site]:
    """One site of each stack, kind of keys and axes in a trace."""
    return {(c.site.stack, c.site.crosses, c.site.axes): c.site for c in trace.calls}


def _foreign(site: Site, kinds: Collection[tuple[str, bool, str]]) -> str | None:
    if site.axes != "tokens":
        return f"it needs tokens, and its keys are {site.axes}"
    stacks = {stack for stack, _, _ in kinds}
    if site.stack in _NO_TEXT:
        return f"it needs tokens, and the {site.stack} stack reads none"
    if site.crosses:
        # A decoder or a fusion layer may read either tower.
        other = sorted(stacks & _NO_TEXT)
        return f"its keys may be those of the {other[0]} stack, which are no tokens" if other else None
    if "text" in stacks and site.stack != "text":
        return (
            f"the tokens are the text stack's; trace again with tokens={{{site.stack!r}: …}}, or set trace.stack_tokens"
        )
    crossing = {stack for stack, crosses, _ in kinds if crosses}
    # An encoder that crosses to its input has latents, or learned queries, of its own.
    if crossing and (site.stack != "encoder" or "encoder" in crossing):
        return f"the tokens are the encoder's; trace again with tokens={{{site.stack!r}: …}}, or set trace.stack_tokens"
    return None


# ---------------------------------------------------------------------------------- which entry of a list is which key


def key_positions(call: Call, trace: TraceData, s: int, lengths: Collection[int]) -> range | None:
    """S: the place of each key in lists that have one entry for each token of its sequence; None: they don't line up.

    A list as long as the keys is theirs. Of a sequence that grows from step to step, a list may be longer (what
    follows was not there yet) or shorter, but not shorter than the prompt (what follows has no name): a place may then
    be behind the end of the list. The keys of a sliding window begin where the window does.

    Args:
        call: the call.
        trace: with the other steps of the same site, as far as they were kept.
        s: S.
        lengths: of the lists, one for each batch entry, or one for all. Lists of several lengths have lost their
            padding, so that they don't line up.
    """
    if len(set(lengths)) != 1:
        return None
    n = next(iter(lengths))
    place = _place(call, trace, s)
    if place is None:
        return None
    fits = n >= place.least if place.grows else n == s
    return range(place.first, place.first + s) if fits else None


def cross_positions(call: Call, trace: TraceData, t: int, lengths: Collection[int]) -> list[int] | None:
    """T: the place of each query of cross-attention in lists of its own sequence; None: they don't line up.

    Of a generation each step's queries follow those of the steps before it. Where each step has more of them than the
    one before, all are fed again from their beginning.

    Args:
        call, trace, lengths: as in :func:`key_positions`.
        t: T of what was kept.
    """
    rows = range(t) if call.queries is None else call.queries
    steps = _steps(call, trace)
    fed = [n for c in steps if (n := kernel_queries(c)) is not None]
    if len(set(lengths)) != 1 or len(fed) < len(steps):
        return None
    i = next(n for n, c in enumerate(steps) if c is call)
    again = len(fed) > 1 and all(a < b for a, b in pairwise(fed))
    n = next(iter(lengths))
    if n != fed[0] if len(fed) == 1 and not is_stitched(call) else n < fed[0]:
        return None
    first = 0 if again else sum(fed[:i])
    return [first + row for row in rows]


class _Place(NamedTuple):
    """Where the keys of a call are in its sequence.

    Attributes:
        first: the position of the first key.
        grows: whether the sequence is longer in other steps.
        least: how many tokens a list of it has at least.
    """

    first: int
    grows: bool
    least: int


def _place(call: Call, trace: TraceData, s: int) -> _Place | None:
    """None: the trace has several sequences of this site, and a cache that may be of any."""
    whole = _Place(0, False, s)
    if call.site.crosses:
        return whole
    if is_stitched(call):
        return _Place(0, True, s)
    steps = _steps(call, trace)
    sizes = [_kernel_extents(c) for c in steps] if len(steps) > 1 else []
    known = [size for size in sizes if size is not None]
    if len(steps) == 1 or len(known) < len(sizes):
        return whole
    i = next(n for n, c in enumerate(steps) if c is call)
    fed, keys = [t for t, _ in known], [k for _, k in known]
    before = [k - t for t, k in known]
    if all(n <= 0 for n in before):
        # Without a cache each step is fed all from its beginning.
        longer = all(a < b for a, b in pairwise(keys))
        return _Place(0, True, keys[0]) if longer else whole
    if any(n <= 0 for n in before[1:]):
        return whole if before[i] <= 0 else None
    if before[0] > 0 and all(b - a == t for a, b, t in zip(keys, keys[1:], fed[1:], strict=False)):
        # The cache was filled before the first of these steps, and has dropped nothing since.
        return _Place(0, True, keys[-1])
    if before[0] > 0 and (steps[0].step != 0 or len(set(keys)) > 1):
        return whole
    # What begins with an empty cache: one that grows, one of fixed size, or a window that drops the oldest keys.
    return _Place(max(0, _past(before, fed, i) + fed[i] - s), True, fed[0])


def _past(before: Sequence[int], fed: Sequence[int], i: int) -> int:
    """The position of the first query of a step, from what each step had in its cache and was fed."""
    # A cache that only ever grows tells it, also where rejected candidates are taken back.
    grows = len(before) > 2 and before[0] == 0 and all(a < b for a, b in pairwise(before))
    return before[i] if grows and i else sum(fed[:i])


def _steps(call: Call, trace: TraceData) -> list[Call]:
    """The calls of one site in the order of the trace. The n-th run of a module in each step is a site of its own."""
    crosses = call.site.crosses
    of_site = [c for c in trace.calls if c.site.path == call.site.path and c.site.crosses == crosses]
    runs: dict[int, int] = {}
    nth = []
    for c in of_site:
        nth.append(runs.get(c.step, 0))
        runs[c.step] = nth[-1] + 1
    own = next((n for c, n in zip(of_site, nth, strict=True) if c is call), None)
    return [call] if own is None else [c for c, n in zip(of_site, nth, strict=True) if n == own]


def _kernel_extents(call: Call) -> tuple[int, int] | None:
    """How many queries the kernel of a call had, and S; None: nothing that was kept tells."""
    t, s = kernel_queries(call), extents_of(call, "S").s
    if t is None and call.queries is not None:
        t = max(call.queries) + 1  # a file of format 1.1 or older says no more
    return None if t is None or s is None else (t, s)
