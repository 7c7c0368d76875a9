"""Numbers of a trace as a table of pandas, or as a labelled array of xarray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from ..calls.call import Call
from ..calls.key_tokens import cross_positions, key_positions, lists_of_keys, lists_of_queries
from ..calls.query_positions import query_positions
from ..calls.trace_data import TraceData
from ..errors import FieldNotCaptured, SelectionError
from ..optional import extra_named
from ..statistics.registry import STATISTICS

if TYPE_CHECKING:
    import pandas
    import xarray

MOST = 20_000_000
"""Rows of a table: more are refused, as they take gigabytes."""
_OF_PAIRS = ("weights", "applied", "scores", "mask")
_AXES = {"B": "batch", "H": "head", "T": "query", "S": "key"}


def to_pandas(trace: TraceData, field: str = "weights", masked: bool = False) -> pandas.DataFrame:
    """See :meth:`hookattn.Trace.to_pandas`."""
    with extra_named():
        import pandas as pd

    _check(trace, field)
    checks.flag("masked", masked)
    # How many rows there are is known before anything is derived.
    frames, total = [], 0
    for call in trace.calls:
        value, axes = _values(call, field)
        open_ = _open(call, value) if axes == "BHTS" and not masked and field != "mask" else None
        total += value.numel() if open_ is None else int(open_.sum())
        if total > MOST:
            raise SelectionError(
                f"a table of {field} has more than {MOST:,} rows; take a part: trace.select(layer=…, heads=…, "
                "queries=…, batch=…)."
            )
        frames.append(pd.DataFrame(_columns(trace, call, value, axes, open_)))
    return pd.concat(frames, ignore_index=True)


def to_xarray(trace: TraceData, field: str = "weights") -> xarray.DataArray:
    """See :meth:`hookattn.Trace.to_xarray`."""
    with extra_named():
        import xarray as xr

    _check(trace, field)
    found = [_values(call, field) for call in trace.calls]
    places = {(c.site.stack, c.site.kind, c.step, c.heads, c.queries, tuple(v.shape))
              for c, (v, _) in zip(trace.calls, found, strict=True)}  # fmt: skip
    if len(places) > 1:
        raise SelectionError(
            "to_xarray stacks calls of one stack, kind, step and shape, and these differ: "
            f"{'; '.join(f'{a} {b}, step {c}, {e}' for a, b, c, _, _, e in sorted(places, key=str)[:4])}. Take one of "
            "these first: trace.select(stack=…, kind=…, step=…)."
        )
    first, (value, axes) = trace.calls[0], found[0]
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
    data = torch.stack([v.detach().cpu() for v, _ in found])
    data = data.float() if data.dtype in (torch.bfloat16, torch.float16) else data
    attrs = {
        "stack": first.site.stack,
        "kind": first.site.kind,
        "step": first.step,
        "faithful": trace_is_faithful(trace),
    }
    return xr.DataArray(data.numpy(), dims=dims, coords=coords, name=field, attrs=attrs)


def trace_is_faithful(trace: TraceData) -> bool:
    """Whether every certificate is within tolerance."""
    return all(call.certificate.faithful for call in trace.calls)


def _check(trace: TraceData, field: str) -> None:
    checks.text("field", field)
    if field not in _OF_PAIRS and field.partition("(")[0] not in STATISTICS:
        known = ", ".join((*_OF_PAIRS, *STATISTICS))
        raise SelectionError(f"field={field!r}: expected one that has a number for each pair, query or key: {known}.")
    if not trace.calls:
        raise SelectionError("the trace has no calls.")


def _values(call: Call, field: str) -> tuple[Tensor, str]:
    """The numbers, and the letters of their axes."""
    value = call.get(field)
    if value is None:
        raise FieldNotCaptured(f"{call.site.label} has no {field}.")
    if field == "mask":
        like = call.get("weights") if call.has("weights") else call.get("scores") if call.has("scores") else None
        value = value if like is None else value.broadcast_to(like.shape)
    axes = "BHTS" if field in _OF_PAIRS else "BHS" if field.startswith("received") else "BHT"
    if value.ndim != len(axes):
        raise SelectionError(
            f"field={field!r} has the shape {tuple(value.shape)}, and a table takes B H T S, B H T or B H S."
        )
    return value, axes


def _open(call: Call, value: Tensor) -> Tensor | None:
    """bool, B H T S: what may be attended to; None: all, or nobody knows."""
    mask = call.get("mask") if call.has("mask") else None
    return None if mask is None else mask.broadcast_to(value.shape)


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
    value = next((call.get(name) for name in ("weights", "scores") if call.has(name)), None)
    if value is None:
        return None
    t, s = value.shape[2:]
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
