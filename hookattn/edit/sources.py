"""Where values of another run come from: the calls of a trace that fit a call which is edited."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calls.call import Call
from ..calls.deriving import shape_and_dtype
from ..calls.query_positions import query_positions
from ..calls.trace_data import TraceData
from ..errors import EditError, FieldAbsent, FieldNotCaptured
from .base import Edit
from .edited_call import EditedCall
from .part import axes_of


def calls_like(trace: TraceData, call: EditedCall, edit: Edit) -> list[Call]:
    """The calls of a trace at the site of a call, all steps; of another model the site is that of the same stack, kind
    and layer.

    Raises:
        EditError: there is none.
    """
    site = call.site
    found = [c for c in trace.calls if c.site.path == site.path and c.site.kind == site.kind]
    if not found and site.layer is not None:
        place = site.stack, site.kind, site.layer
        found = [c for c in trace.calls if (c.site.stack, c.site.kind, c.site.layer) == place]
    if not found:
        raise EditError(
            f"{call.where(edit)}: the trace that values are taken of has no call at this site, nor in layer "
            f"{site.layer} of {site.stack} {site.kind}; is it of another model?"
        )
    return found


def counterpart(trace: TraceData, call: EditedCall, edit: Edit) -> Call:
    """The call of another run that a call is given values of: of the same site and step, or of its only step.

    Raises:
        EditError: there is none, or several.
    """
    there = calls_like(trace, call, edit)
    same = [c for c in there if c.step == call.step] or there
    if len(same) > 1:
        steps = sorted({c.step for c in same})
        raise EditError(
            f"{call.where(edit)}: the trace has {len(same)} calls here, of steps {steps}, and none alone is of step "
            f"{call.step}; give one of them (trace.select(step=…))."
        )
    return same[0]


def taken_from(source: Call, call: EditedCall, edit: Edit, free: str = "") -> Tensor:
    """The entries of a call of another run that stand where the edited entries stand.

    Queries and keys are the same by their positions in the sequence, heads by their numbers.

    Args:
        source: the call of another run.
        call, edit: what they are for.
        free: letters of axes of which all is taken, however much it is.

    Raises:
        EditError: it has no such field, or none of these entries.
    """
    name, axes = edit.field, axes_of(edit.field)
    try:
        whole = source.get(name)
    except (FieldNotCaptured, FieldAbsent) as error:
        raise EditError(f"{call.where(edit)}: {error}") from error
    if whole is None:
        raise EditError(f"{call.where(edit)}: the call that values are taken of has no {name}.")
    for dim, (letter, extent) in enumerate(zip(axes, call.part.shape(axes, call.extents), strict=True)):
        n, numbers = whole.shape[dim], call.numbers(letter)
        if letter == "T" and source.step == call.step and n == call.extents["T"] and call.part.rows is None:
            continue  # the same rows of the same step, wherever they are
        if letter in free or (n == 1 and letter == "B"):
            continue
        if numbers is None:  # of a width there are no numbers
            if n == extent:
                continue
            raise EditError(
                f"{call.where(edit)}: {name} has {letter}={extent} here, and {letter}={n} in the call that values are "
                "taken of."
            )
        kept = _kept(source, letter, n, call, edit)
        place = {number: i for i, number in enumerate(kept)}
        missing = [i for i in numbers if i not in place]
        if missing or (n != call.extents[letter] and letter in "BHG" and len(numbers) == call.extents[letter]):
            there = f"it has {n}" + (f", from {kept[0]} to {kept[-1]}" if kept else "")
            which = f"no {_NAMES[letter]} {missing[0]}" if missing else f"other {_NAMES[letter]}s"
            raise EditError(
                f"{call.where(edit)}: the call that values are taken of has {which} ({there}); select what both have "
                "with heads=, queries=, keys= or batch=."
            )
        if numbers != kept:
            whole = whole.index_select(dim, torch.tensor([place[i] for i in numbers], device=whole.device))
    return whole.detach()


_NAMES = {"B": "batch entry", "H": "head", "G": "key head", "T": "query at position", "S": "key"}


def _kept(source: Call, letter: str, n: int, call: EditedCall, edit: Edit) -> tuple[int, ...]:
    """The numbers of what is along an axis of a kept call: of queries their positions in the sequence."""
    if letter == "H" and source.heads is not None:
        return source.heads
    if letter == "G" and source.heads is not None and (found := _key_heads(source, n)) is not None:
        return found
    if letter == "G" and source.heads is not None:
        raise EditError(
            f"{call.where(edit)}: the call that values are taken of was kept with heads=, and which of the model's key "
            "heads it has is not known; trace it without."
        )
    if letter == "T":
        return query_numbers(source, n)
    return tuple(range(n))


def _key_heads(source: Call, n: int) -> tuple[int, ...] | None:
    """The numbers of the key heads of a call that has some of the model's heads, where its shard tells how many heads
    read each of them; None: nothing does."""
    shard = source.shard
    if shard is None or shard.of is None or shard.groups_of is None or shard.of % shard.groups_of:
        return None
    found = tuple(sorted({head // (shard.of // shard.groups_of) for head in source.heads or ()}))
    return found if len(found) == n else None


def query_numbers(source: Call, n: int) -> tuple[int, ...]:
    """The positions in the sequence of the query rows of a kept call; with a cache the keys tell."""
    rows = source.queries or tuple(range(n))
    keys = next((s for name in ("k", "weights", "v") if (s := _keys_of(source, name)) is not None), None)
    if keys is None or source.site.crosses or keys == n:
        return rows
    found = query_positions(source, n, keys)
    return rows if found is None or len(found) != 1 else tuple(found[0].tolist())


def _keys_of(source: Call, name: str) -> int | None:
    return None if not source.has(name) else shape_and_dtype(source, name)[0][3 if name == "weights" else 2]
