"""Traces of ranks, cut out of the trace of a whole model; and whether two traces are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import hookattn
from hookattn.calls.call import Call
from hookattn.calls.edits import AppliedEdit
from hookattn.calls.extents import extents_of, key_heads
from hookattn.calls.fields import tensor_of

NUMBERS = {"H": "heads", "T": "queries", "B": "batch"}


def cut(trace: hookattn.Trace, axis: str, counts: Sequence[int], mesh: str = "tp") -> list[hookattn.Trace]:
    """The traces of ranks of which each has so many heads, query rows or batch entries, one after the other.

    Args:
        trace: of the whole, with the fields in memory.
        axis: ``"H"``, ``"T"`` or ``"B"``.
        counts: how many each has.
        mesh: the name of the dimension.
    """
    starts = [sum(counts[:i]) for i in range(len(counts))]
    made = []
    for index, (start, n) in enumerate(zip(starts, counts, strict=True)):
        calls = [_part(call, axis, start, n, sum(counts), mesh, index, len(counts)) for call in trace.calls]
        tokens = trace.tokens
        if axis == "B" and tokens is not None:
            tokens = tokens[start : start + n]
        made.append(replace(trace, calls=calls, tokens=tokens, notes=list(trace.notes)))
    return made


def _part(call: Call, axis: str, start: int, n: int, of: int, mesh: str, index: int, count: int) -> Call:
    own = range(start, start + n)
    part: Any = call.at(**{NUMBERS[axis]: own})
    group_start = groups_of = None
    if axis == "H":
        g = extents_of(call, "G").g
        if g is not None:
            groups_of, group_start = g, min(key_heads(call, of, g)[h] for h in own)
        part.heads = tuple(own)
    elif axis == "T":
        part.queries, part.of_queries = tuple(own), of
        part.certificate = replace(call.certificate, rows=n, of_rows=n)
        received = call.fields.get("received")
        if received is not None:  # a rank sums up over its own rows
            part.fields["received"] = tensor_of(part.fields["received"]) * (n / of)  # type: ignore[arg-type,operator]
    shard = hookattn.Shard(axis, start, of, group_start, groups_of, mesh, index, count)
    part.shards = (*call.shards, shard)
    part.shards = tuple(sorted(part.shards, key=lambda s: "HTB".index(s.axis)))
    if axis == "H":
        part.edits = tuple(e for e in call.edits if _touches(call, e, own))
        part.edits = tuple(_of_heads(call, e, own) for e in part.edits)
    elif axis == "T":
        part.edits = tuple(
            replace(e, queries=None if e.queries is None else tuple(q for q in e.queries if q in own))
            for e in call.edits
            if e.queries is None or set(e.queries) & set(own)
        )
    return part  # type: ignore[no-any-return]


def _groups(call: Call, own: range) -> set[int]:
    found = extents_of(call, "HG")
    assert found.h is not None and found.g is not None
    return {key_heads(call, found.h, found.g)[h] for h in own}


def _numbers(call: Call, edit: AppliedEdit, own: range) -> set[int]:
    return _groups(call, own) if edit.field in ("k", "v") else set(own)


def _touches(call: Call, edit: AppliedEdit, own: range) -> bool:
    return edit.heads is None or bool(set(edit.heads) & _numbers(call, edit, own))


def _of_heads(call: Call, edit: AppliedEdit, own: range) -> AppliedEdit:
    if edit.heads is None:
        return edit
    return replace(edit, heads=tuple(h for h in edit.heads if h in _numbers(call, edit, own)))


def same_tensor(found: Tensor, expected: Tensor, bound: float = 1e-6) -> None:
    if found.dim() == 4 or expected.dim() == 4:
        shape = torch.broadcast_shapes(found.shape, expected.shape)
        found, expected = found.expand(shape), expected.expand(shape)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    size = max(1.0, expected.abs().amax().item()) if expected.is_floating_point() and expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * size, equal_nan=True)


def same_call(found: Call, expected: Call, bound: float = 1e-6) -> None:
    """Everything that a reader may ask of a call."""
    assert found.site == expected.site and (found.step, found.index) == (expected.step, expected.index)
    for name in ("tap", "dtype", "softcap", "causal", "window", "dropout", "own_scores", "own_by_edits", "mixed"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("score", "normalizer", "basis", "entry", "keys", "derivable", "requests", "edits", "queries"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.heads == expected.heads and found.shards == expected.shards == ()
    assert found.of_queries == expected.of_queries
    assert [*found.fields] == [*expected.fields]
    known = extents_of(expected)
    assert extents_of(found) == known
    if known.g is not None and known.h is not None:
        assert key_heads(found, known.h, known.g) == key_heads(expected, known.h, known.g)
    for name in dict.fromkeys((*expected.fields, *expected.derivable)):
        one, other = found.get(name), expected.get(name)
        assert (one is None) == (other is None), name
        if one is not None and other is not None:
            same_tensor(one, other, bound)
    if isinstance(expected.scale, Tensor):
        assert isinstance(found.scale, Tensor)
        same_tensor(found.scale, expected.scale)
    else:
        assert found.scale == expected.scale
    assert found.certificate.status == expected.certificate.status
    assert (found.certificate.rows, found.certificate.of_rows) == (
        expected.certificate.rows,
        expected.certificate.of_rows,
    )


def same_trace(found: hookattn.Trace, expected: hookattn.Trace, bound: float = 1e-6) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        same_call(one, other, bound)
    assert found.tokens == expected.tokens and found.stack_tokens == expected.stack_tokens
    assert found.skipped == expected.skipped
