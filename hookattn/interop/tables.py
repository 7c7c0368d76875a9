"""Numbers of a trace as a table of pandas, or as a labelled array of xarray."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor

from .. import checks
from ..calls.call import Call
from ..calls.deriving import shape_and_dtype
from ..calls.extents import extents_of
from ..calls.fields import DERIVED, Derived, shape_of
from ..calls.key_tokens import cross_positions, key_positions, lists_of_keys, lists_of_queries
from ..calls.query_positions import query_positions
from ..calls.trace_data import TraceData
from ..errors import FieldNotCaptured, SelectionError
from ..optional import extra_named
from ..statistics.registry import STATISTICS, resolve

if TYPE_CHECKING:
    import pandas
    import xarray

MOST = 20_000_000
"""Rows of a table: more are refused, as they take gigabytes."""
_BLOCK = 1 << 24
"""Numbers of a mask that are looked at in one go, to count its pairs."""
_OF_PAIRS = ("weights", "applied", "scores", "mask")
_AXES = {"B": "batch", "H": "head", "T": "query", "S": "key"}


def to_pandas(trace: TraceData, field: str = "weights", masked: bool = False) -> pandas.DataFrame:
    """See :meth:`hookattn.Trace.to_pandas`."""
    with extra_named():
        import pandas as pd

    _check(trace, field)
    checks.flag("masked", masked)
    _check_size(trace, field, masked)
    frames = []
    for call in trace.calls:
        value = _values(call, field)
        open_ = None if masked else _open(call, field, value.shape)
        frames.append(pd.DataFrame(_columns(trace, call, value, _axes(field), open_)))
    return pd.concat(frames, ignore_index=True)


def to_xarray(trace: TraceData, field: str = "weights") -> xarray.DataArray:
    """See :meth:`hookattn.Trace.to_xarray`."""
    with extra_named():
        import xarray as xr

    _check(trace, field)
    places = {(c.site.stack, c.site.kind, c.step, c.heads, c.queries, _shape(c, field)) for c in trace.calls}
    if len(places) > 1:
        raise SelectionError(
            "to_xarray stacks calls of one stack, kind, step and shape, and these differ: "
            f"{'; '.join(f'{a} {b}, step {c}, {e}' for a, b, c, _, _, e in sorted(places, key=str)[:4])}. Take one of "
            "these first: trace.select(stack=…, kind=…, step=…)."
        )
    found = [_values(call, field) for call in trace.calls]
    first, value, axes = trace.calls[0], found[0], _axes(field)
    dims = ["layer", *(_AXES[letter] for letter in axes)]
    layers = [i if c.site.layer is None else c.site.layer for i, c in enumerate(trace.calls)]
    coords: dict[str, Any] = {"layer": layers, "path": ("layer", [c.site.path for c in trace.calls])}
    numbers = {"B": range(value.shape[0]), "H": _numbers(first.heads, value.shape[1])}
    if "T" in axes:
        numbers["T"] = _numbers(first.queries, value.shape[2])
    if "S" in axes:
        numbers["S"] = range(value.shape[-1])
    coords |= {_AXES[letter]: list(own) for letter, own in numbers.items()}
    for letter, names in (("T", _query_tokens(trace, first)), ("S", _key_tokens(trace, first, value.shape[-1]))):
        if letter in axes and names is not None:
            rows = names * value.shape[0] if len(names) == 1 else names
            coords[f"{_AXES[letter]}_token"] = (("batch", _AXES[letter]), rows)
    data = torch.stack([v.detach().cpu() for v in found])
    data = data.float() if data.dtype in (torch.bfloat16, torch.float16) else data
    attrs = {
        "stack": first.site.stack,
        "kind": first.site.kind,
        "step": first.step,
        "faithful": trace.faithful,
    }
    return xr.DataArray(data.numpy(), dims=dims, coords=coords, name=field, attrs=attrs)


def _check(trace: TraceData, field: str) -> None:
    checks.text("field", field)
    if field not in _OF_PAIRS and field.partition("(")[0] not in STATISTICS:
        known = ", ".join((*_OF_PAIRS, *STATISTICS))
        raise SelectionError(f"field={field!r}: expected one that has a number for each pair, query or key: {known}.")
    if not trace.calls:
        raise SelectionError("the trace has no calls.")


def _check_size(trace: TraceData, field: str, masked: bool) -> None:
    """Raises SelectionError where a table has too many rows; nothing is derived to know it, and a mask formed in parts
    at the most."""
    total = 0
    for call in trace.calls:
        for rows in _counts(call, field, masked):
            total += rows
            if total > MOST:
                raise SelectionError(
                    f"a table of {field} has more than {MOST:,} rows; take a part: trace.select(layer=…, heads=…, "
                    "queries=…, batch=…)."
                )


def _counts(call: Call, field: str, masked: bool) -> Iterator[int]:
    """How many rows a call has in a table, some queries at a time."""
    shape = _shape(call, field)
    if masked or not _hides(call, field):
        yield math.prod(shape)
        return
    b, h, t, s = shape
    step = max(1, _BLOCK // max(1, b * h * s))
    if step >= t:
        yield _pairs(call, shape)
        return
    own = range(t) if call.queries is None else call.queries
    for at in range(0, t, step):
        rows = list(own[at : at + step])
        yield _pairs(call.at(queries=rows), (b, h, len(rows), s))


def _pairs(call: Call, shape: Sequence[int]) -> int:
    """How many pairs of a query and a key may be attended to, of all batch entries and heads."""
    mask = call.get("mask")
    return math.prod(shape) if mask is None else int(mask.sum()) * (math.prod(shape) // max(1, mask.numel()))


def _axes(field: str) -> str:
    """The letters of the axes of a field in a table."""
    return "BHTS" if field in _OF_PAIRS else "BHS" if field.startswith("received") else "BHT"


def _shape(call: Call, field: str) -> tuple[int, ...]:
    """How large a field is, for which it is neither derived nor read.

    Raises:
        FieldNotCaptured: it was not captured, or the call has none.
        SelectionError: it has an axis too many for a table.
    """
    named = resolve(field, call.fields)  # a statistic, by its plain name
    place = call.fields.get(named[0] if len(named) == 1 else field, DERIVED)
    if isinstance(place, Derived):
        if not call.has(field):
            call.get(field)  # raises, and says what was captured
        return tuple(shape_and_dtype(call, field)[0])
    if place is None:
        raise FieldNotCaptured(f"{call.site.label} has no {field}.")
    own, axes = shape_of(place), _axes(field)
    if field in _OF_PAIRS:
        # What is the same for all batch entries, heads or queries may have one of them.
        known = extents_of(call, axes).known(axes)
        own = Size((1,) * (4 - len(own)) + tuple(own))
        own = Size(known.get(letter, 1) if n == 1 else n for letter, n in zip(axes, own, strict=True))
    if len(own) != len(axes):
        raise SelectionError(f"field={field!r} has the shape {tuple(own)}, and a table takes B H T S, B H T or B H S.")
    return tuple(own)


def _values(call: Call, field: str) -> Tensor:
    """The numbers, as large as :func:`_shape` says."""
    shape, value = _shape(call, field), call.get(field)
    assert value is not None  # the shape of what is not there is none
    return value.broadcast_to(shape)


def _hides(call: Call, field: str) -> bool:
    """Whether a table of a field leaves out the pairs that a mask hides."""
    return field in _OF_PAIRS and field != "mask" and call.has("mask")


def _open(call: Call, field: str, shape: Sequence[int]) -> Tensor | None:
    """bool, B H T S: what may be attended to; None: all, or nobody knows."""
    mask = call.get("mask") if _hides(call, field) else None
    return None if mask is None else mask.broadcast_to(shape)


def _columns(trace: TraceData, call: Call, value: Tensor, axes: str, open_: Tensor | None) -> dict[str, Any]:
    at = (torch.ones(value.shape, dtype=torch.bool) if open_ is None else open_.cpu()).nonzero()
    columns: dict[str, Any] = {
        "call": call.index, "step": call.step, "layer": call.site.layer, "stack": call.site.stack,
        "kind": call.site.kind, "path": call.site.path, "batch": at[:, 0].numpy(),
        "head": _of(_numbers(call.heads, value.shape[1]), at[:, 1]),
    }  # fmt: skip
    if "T" in axes:
        columns["query"] = _of(_numbers(call.queries, value.shape[2]), at[:, 2])
        columns["query_token"] = _named(_query_tokens(trace, call), at[:, 0], at[:, 2])
    if "S" in axes:
        columns["key"] = at[:, -1].numpy()
        columns["key_token"] = _named(_key_tokens(trace, call, value.shape[-1]), at[:, 0], at[:, -1])
    own = value.detach().cpu()
    chosen = own.flatten() if open_ is None else own[open_.cpu()]
    columns["value"] = (chosen.float() if chosen.dtype in (torch.bfloat16, torch.float16) else chosen).numpy()
    return columns


def _numbers(kept: Sequence[int] | None, count: int) -> Sequence[int]:
    return range(count) if kept is None else kept


def _of(numbers: Sequence[int], at: Tensor) -> Any:
    return torch.tensor(list(numbers))[at].numpy()


def _named(names: list[list[str | None]] | None, batch: Tensor, place: Tensor) -> list[str | None] | None:
    if names is None:
        return None
    return [names[b if len(names) > 1 else 0][i] for b, i in zip(batch.tolist(), place.tolist(), strict=True)]


def _key_tokens(trace: TraceData, call: Call, s: int) -> list[list[str | None]] | None:
    """For each batch entry, or for all, the token of each key; None: they have none."""
    lists = lists_of_keys(call, trace)
    if isinstance(lists, str):
        return None
    at = key_positions(call, trace, s, {len(row) for row in lists})
    return None if at is None else [[row[i] if i < len(row) else None for i in at] for row in lists]


def _query_tokens(trace: TraceData, call: Call) -> list[list[str | None]] | None:
    """The same of each query."""
    _, _, _, t, s, _, _ = extents_of(call, "TS")
    if t is None or s is None:
        return None
    if call.site.crosses:
        lists = lists_of_queries(call, trace)
        places = None if isinstance(lists, str) else cross_positions(call, trace, t, {len(row) for row in lists})
        if isinstance(lists, str) or places is None:
            return None
        return [[row[i] if i < len(row) else None for i in places] for row in lists]
    keys = _key_tokens(trace, call, s)
    found = query_positions(call, t, s)
    if keys is None or found is None:
        return None
    rows = found.tolist()
    count = max(len(keys), len(rows))
    pairs = zip(keys * (count // len(keys)), rows * (count // len(rows)), strict=True)
    return [[names[i] if 0 <= i < len(names) else None for i in places] for names, places in pairs]
