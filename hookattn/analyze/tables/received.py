"""What each key gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from ... import statistics as st
from ...calls.key_tokens import has_tokens
from ..call_view import View
from ..frame import long_table, views_of_heads
from ..labels import named_keys

if TYPE_CHECKING:
    from pandas import DataFrame

    from ...traces import TraceLike


def received(trace: TraceLike, *, real: Any = None) -> DataFrame:
    """The attention that each key gets from the queries that count (heavy hitters: Zhang et al. 2023, H2O).

    Args:
        trace: with weights, with what they follow from, or with the statistic ``received`` and one of each query, such
            as ``lse``, that tells how many there are. A column sum has no rows to leave out: where some queries are
            padding, the weights are needed.
        real: bool or 0/1, B S: True = a real token, no padding.

    Returns:
        A pandas DataFrame with the columns of a call, ``head``, ``example``, ``key`` (and ``token``, where the trace
        has tokens; missing where they are not those of the call), ``sum`` = ``Σ_i w_ij``, ``queries`` = how many
        queries may attend to this key, and ``mean``, the sum over their number; these two are NaN where the mask was
        not kept. Keys that are padding are left out.

    Raises:
        FieldNotCaptured: neither the statistic nor what it can be computed of was kept.
        MeasureError: ``real`` doesn't fit.
    """
    import pandas as pd

    return pd.concat([_received_table(view) for view in views_of_heads(trace, real)], ignore_index=True)


def _received_table(view: View) -> DataFrame:
    b, h, _, s = view.shape
    total = _received_weight(view).double()
    queries = torch.full_like(total, torch.nan)
    if view.call.has("mask"):
        queries = view.pairs.sum(-2).double().expand(b, h, s)
    axes = {"head": view.heads, "example": range(b), "key": range(s)}
    values = {"sum": total, "queries": queries, "mean": total / queries}
    table = long_table(view, axes, {name: rearrange(value, "b h s -> h b s") for name, value in values.items()})
    if has_tokens(view.trace):
        tokens = named_keys(view)
        found = [[None] * s] * b if isinstance(tokens, str) else tokens
        table.insert(list(table.columns).index("sum"), "token", [x for row in found for x in row] * h)
    return table.loc[view.keys.flatten().tolist() * h]


def _received_weight(view: View) -> Tensor:
    """B H S: what the rows that count give."""
    _, _, t, s = view.shape
    mask = view.mask.expand(*view.mask.shape[:2], t, s)
    # A column sum that was kept holds all rows. It may be read where each row counts or has nothing to attend to.
    whole = bool((view.rows | ~mask.any(-1).any(1)).all())
    shares = view.no_distribution is None
    if whole and shares and (st.Received().key in view.call.fields or "weights" not in view.call.fields):
        return view.stat(st.Received())
    return (view.weights * view.rows[:, None, :, None]).sum(-2)
