"""How far two traces are apart, head by head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...attention.kernel_call import FIELD_SPECS
from ...calls.call import Call
from ...calls.certificate import tolerance
from ...calls.edits import AppliedEdit, set_by_edits
from ...calls.extents import extents_of, key_heads
from ...errors import MeasureError
from ...traces import TraceLike, as_trace
from ..call_view import View, blocks_of
from ..frame import long_table, ranked_table, views

if TYPE_CHECKING:
    from pandas import DataFrame

UNITS = {
    "total_variation": "share",
    "jensen_shannon": "nats",
    "max_difference": "share",
    "output_difference": "share of the first's norm",
}

# Weights of both, with their sinks, their distance, and what their divergence is made of.
_MATRICES = 8


def compare(a: TraceLike, b: TraceLike, *, real: Any = None) -> DataFrame:
    """How far each head of one trace is from the same head of another: two prompts, two checkpoints, two kernels.

    Of the rows that count in both. What goes to sinks is one key more. For the weights p of ``a`` and q of ``b``:

    * ``total_variation``: ``½ Σ_j |p_j − q_j|``, the mean over the rows; 0 to 1.
    * ``jensen_shannon``: ``½ KL(p ‖ m) + ½ KL(q ‖ m)`` with ``m = ½ (p + q)``, the mean over the rows, in nats; 0 to
      ln 2 (Lin 1991).
    * ``max_difference``: the largest ``|p_j − q_j|`` of any row.
    * ``output_difference``: ``‖o_a − o_b‖ / ‖o_a‖`` over the rows; NaN where either trace has no output.

    Where either trace was edited (:func:`hookattn.editing`) there is one column more, ``edited``: what was done to the
    head in ``a`` and in ``b``. Weights that an edit has made negative, or to sum to more than 1, have no divergence
    (NaN), and their total variation may be above 1.

    Args:
        a: with weights, or what they can be derived of.
        b: of the same calls, heads, queries and extents.
        real: B S, see :func:`hookattn.analyze.measure`; for both.

    Returns:
        A pandas DataFrame, the largest ``total_variation`` first: ``call``, ``step``, ``layer``, ``stack``, ``kind``,
        ``path``, ``head`` (and ``edited``), and the above in their order; NaN where no row counts in both.
        ``attrs["units"]`` has the units.

    Raises:
        MeasureError: the traces do not fit each other; says where and in what.
        FieldNotCaptured: a trace has no weights.
    """
    a, b = as_trace(a, "a"), as_trace(b, "b")
    if a.calls and b.calls and len(a.calls) != len(b.calls):
        raise MeasureError(
            f"the traces do not fit: one has {len(a.calls)} calls and the other {len(b.calls)}; take the calls that "
            "both have with trace.select(…)."
        )
    frames = []
    any_edited = any(call.edits for trace in (a, b) for call in trace.calls)
    for one, other in zip(views(a, real), views(b, real), strict=True):
        _check_fit(one, other)
        for heads in blocks_of([one, other], _MATRICES):
            apart = _head_distances(one.part(heads), other.part(heads))
            frame = long_table(one, {"head": heads}, apart)
            if any_edited:
                frame.insert(list(frame.columns).index("head") + 1, "edited", [_edited(one, other, h) for h in heads])
            frames.append(frame)
    table = ranked_table(frames, "total_variation")
    table.attrs["units"] = dict(UNITS)
    return table


def _check_fit(one: View, other: View) -> None:
    pairs: dict[str, tuple[Any, Any]] = {
        "path": (one.call.site.label, other.call.site.label),
        "kind": (one.call.site.kind, other.call.site.kind),
        "step": (one.call.step, other.call.step),
        "B H T S": (one.shape, other.shape),
        "heads": (list(one.heads), list(other.heads)),
        "queries": (list(one.queries), list(other.queries)),
    }
    for what, (x, y) in pairs.items():
        if x != y:
            raise MeasureError(
                f"the traces do not fit: {what} of {one.where} is {x}, and of the other's {other.where} {y}."
            )
    for view in (one, other):
        if view.no_distribution is not None and not set_by_edits(view.call.edits, "weights"):
            raise MeasureError(f"compare is of distributions: {view.where}: {view.no_distribution}.")


def _edited(one: View, other: View, head: int) -> str:
    """What was done to a head in either call, in words."""
    told = []
    for name, call in (("a", one.traced), ("b", other.traced)):
        found = [edit for edit in call.edits if _touches(call, edit, head)]
        told += [f"{name}: {'; '.join(map(str, found))}"] if found else []
    return " | ".join(told)


def _touches(call: Call, edit: AppliedEdit, head: int) -> bool:
    """Whether an edit is of a query head, or of the key head that it reads, as far as that is known."""
    if edit.heads is None or "H" in FIELD_SPECS[edit.field].axes:
        return edit.heads is None or head in edit.heads
    known = extents_of(call, "HG").known("HG")
    if call.heads is not None or len(known) < 2:
        return True
    return key_heads(call, known["H"], known["G"])[head] in edit.heads


def _head_distances(one: View, other: View) -> dict[str, Tensor]:
    rows = one.rows & other.rows.to(one.rows.device)
    p, q = _with_sink(one.weights), _with_sink(other.weights.to(one.weights.device))
    p, q = p.to(torch.promote_types(p.dtype, q.dtype)), q.to(torch.promote_types(p.dtype, q.dtype))
    apart = (p - q).abs()
    count = rows.sum()

    def mean(values: Tensor) -> Tensor:
        return torch.where(rows.unsqueeze(1), values, 0.0).sum((0, 2), dtype=torch.float64) / count

    divergence = _half_divergence(p, q) + _half_divergence(q, p)
    sums = torch.where(_are_shares(one, p) & _are_shares(other, q), divergence, torch.nan)
    largest = torch.where(rows.unsqueeze(1), apart.amax(-1), -torch.inf).amax((0, 2)).double()
    return {
        "total_variation": mean(apart.sum(-1) / 2),
        "jensen_shannon": mean(sums),
        "max_difference": torch.where(count > 0, largest, torch.nan),
        "output_difference": _output_difference(one, other, rows),
    }


def _with_sink(weights: Tensor) -> Tensor:
    """B H T S+1: with what goes to no key."""
    return torch.cat([weights, (1 - weights.sum(-1, keepdim=True)).clamp_min(0)], -1)


def _are_shares(view: View, p: Tensor) -> Tensor:
    """1 H 1: whether no weight of a head is negative, and no row sums to more than 1, as edits may have made them."""
    if not set_by_edits(view.call.edits, "weights"):
        return torch.ones(1, 1, 1, dtype=torch.bool, device=p.device)
    most = 1 + 4 * tolerance(view.call.dtype)
    return ((p >= 0).all(-1) & (p.sum(-1) <= most)).all(2, keepdim=True).all(0, keepdim=True)


def _half_divergence(p: Tensor, q: Tensor) -> Tensor:
    """B H T: ``½ KL(p ‖ ½ (p + q))``."""
    # xlogy is 0 where p is 0, whatever the ratio: a key that neither looks at adds nothing.
    ratio = 2 * p / (p + q).clamp_min(torch.finfo(p.dtype).tiny)
    return torch.xlogy(p, ratio).sum(-1) / 2


def _output_difference(one: View, other: View, rows: Tensor) -> Tensor:
    o, other_o = (v.call.get("output") if v.call.has("output") else None for v in (one, other))
    if o is None or other_o is None:
        return torch.full((one.shape[1],), torch.nan, dtype=torch.float64)
    if o.shape != other_o.shape:
        raise MeasureError(
            f"the traces do not fit: output of {one.where} has shape {tuple(o.shape)}, and of the other's "
            f"{other.where} {tuple(other_o.shape)}."
        )

    def size(x: Tensor) -> Tensor:
        return torch.where(rows[:, None, :, None], x, 0.0).square().sum((0, 2, 3)).sqrt()

    wide = o.double()
    return size(wide - other_o.to(wide)) / size(wide)
