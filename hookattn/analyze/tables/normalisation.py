"""Whether weights are what weights have to be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from ... import checks
from ...attention.normalizers import OF_ONE, normalizer_of
from ...calls.certificate import tolerance as tolerance_of
from ...calls.deriving import shape_and_dtype
from ..call_view import View
from ..frame import long_table, views_of_heads

if TYPE_CHECKING:
    from pandas import DataFrame

    from ...traces import TraceLike

# A mask of −100, the weakest there is, leaves 4e-44.
_NOTHING = 1e-30
# The normalizer that is none: its weights are the scores.
_NONE = "none"


def normalisation(trace: TraceLike, *, tolerance: float | None = None) -> DataFrame:
    """What is wrong with the weights of a trace; an empty table: nothing.

    ``row_sum``: a row doesn't sum to 1 (with sinks: sums to more; that there are sinks is known by the field ``sinks``
    alone). ``negative``: a weight is below 0. Both of weights whose normalizer makes them so: of a sigmoid no sum is
    wrong, and of what nobody knows no sign. ``masked``: a key that is masked has weight. ``non_finite``: a weight is
    NaN or ∞. Rows with nothing to attend to may be anything but non-finite; without the field ``mask`` nothing is
    masked, and such rows are those that are 0.

    Args:
        trace: with weights, and best with ``mask`` and ``sinks`` too.
        tolerance: of a row's sum; None: that of a certificate, by dtype.

    Returns:
        A pandas DataFrame with the columns of a call, ``head``, ``check``, ``rows`` (how many fail), ``worst`` (the
        largest distance from what is right), and ``example`` and ``query`` of the worst row.

    Raises:
        MeasureError: the trace has no calls.
        FieldNotCaptured: the weights were not kept.
    """
    import pandas as pd

    if tolerance is not None:
        tolerance = checks.number("tolerance", tolerance, "a number from 0", lambda x: x >= 0)
    return pd.concat([_failures(view, tolerance) for view in views_of_heads(trace)], ignore_index=True)


def _failures(view: View, tolerance: float | None) -> DataFrame:
    import pandas as pd

    t = view.shape[2]
    frames = []
    for check, (error, bound) in _row_errors(view, tolerance).items():
        flat = rearrange(error, "b h t -> h (b t)")
        worst, at = flat.max(-1)
        table = long_table(
            view, {"head": view.heads, "check": [check]}, {"rows": (flat > bound).sum(-1), "worst": worst}
        )
        table["example"] = (at // t).tolist()
        table["query"] = [view.queries[i] for i in (at % t).tolist()]
        frames.append(table[table["rows"] > 0])
    return pd.concat(frames)


def _row_errors(view: View, tolerance: float | None) -> dict[str, tuple[Tensor, float]]:
    """For each check B H T, how far off a row is, and how far it may be."""
    w, call = view.weights, view.call
    if tolerance is None:
        tolerance = max(map(tolerance_of, (call.dtype, shape_and_dtype(call, "weights")[1])))
    bad = ~w.isfinite()
    w = w.masked_fill(bad, 0.0)
    masked = view.mask if call.has("mask") else None
    # Kernels put anything into rows with nothing to attend to (zeros, or a uniform row), and nobody reads them.
    some = w.any(-1) if masked is None else masked.any(-1).expand(w.shape[:3])
    over = w.sum(-1) - 1
    sinks = call.get("sinks") if call.has("sinks") else None
    at_most = sinks is not None or call.normalizer == OF_ONE
    wrong = over.clamp_min(0) if at_most else over.abs()
    known = normalizer_of(call.normalizer)
    if not known.sums_to_one:
        wrong = torch.zeros_like(over)
    below = -w.amin(-1) if known.known and call.normalizer != _NONE else torch.zeros_like(over)
    hidden = torch.zeros_like(over) if masked is None else w.abs().masked_fill(masked, 0.0).amax(-1)
    return {
        "row_sum": (torch.where(some & ~bad.any(-1), wrong, 0.0), tolerance),
        "negative": (torch.where(some, below, 0.0), 0.0),
        "masked": (torch.where(some, hidden, 0.0), _NOTHING),
        "non_finite": (torch.where(bad.any(-1), torch.inf, 0.0), 0.0),
    }
