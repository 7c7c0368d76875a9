"""Which dimensions of queries and keys a score is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from ... import checks
from ...attention.kernel_call import DOT
from ...errors import MeasureError, SelectionError
from ..call_view import View
from ..frame import long_table, views, views_of_heads
from ..tables.decay import distance_places

if TYPE_CHECKING:
    from pandas import DataFrame

    from ...traces import TraceLike


def neuron_contributions(
    trace: TraceLike, query: int | None = None, key: int | None = None, *, real: Any = None
) -> DataFrame:
    """``scale · q_id · k_jd`` of each dimension d (Vig 2019): their sum over d is ``scale · q_i·k_j``.

    That is the score but for soft-cap and bias, and but for what a model adds to scores of its own.

    Args:
        trace: with q and k; and with weights, unless ``key`` is given.
        query: i, a query's number; negative: from the last one that was kept. None: the mean over the queries.
        key: j, negative: from the end. None: where the head looks, ``Σ_j w_ij · scale · q_id · k_jd``.
        real: bool or 0/1, B S: True = a real token, no padding.

    Returns:
        A pandas DataFrame with the columns of a call, ``head``, ``example``, ``neuron`` (d), and ``contribution``, in
        units of the scores.

    Raises:
        SelectionError: ``key`` without ``query``, or one of them is not in a call.
        FieldNotCaptured: a field was not kept.
        MeasureError: the trace has no calls.
    """
    import pandas as pd

    query = None if query is None else checks.whole("query", query)
    key = None if key is None else checks.whole("key", key)
    if query is None and key is not None:
        raise SelectionError(f"key={key} without query=: expected a query too, or neither.")
    frames = []
    for view in views_of_heads(trace, real):
        made = _contributions(view, query, key)
        axes = {"head": view.heads, "example": range(len(made)), "neuron": range(made.shape[-1])}
        frames.append(long_table(view, axes, {"contribution": rearrange(made, "b h d -> h b d")}))
    return pd.concat(frames, ignore_index=True)


def _check_products(view: View) -> None:
    """Raise unless scores are products of queries and keys, whatever else is in them."""
    if view.call.score != DOT:
        raise MeasureError(
            f"neurons of {view.where}: its scores are no product of queries and keys (call.score is "
            f"{view.call.score!r}), so that no dimension has a part of its own in them."
        )


def _contributions(view: View, query: int | None, key: int | None) -> Tensor:
    """B H D, float64."""
    _check_products(view)
    b, h, t, s = view.shape
    q, k = view.tensor("q").double(), view.per_head("k").double()
    scale = torch.as_tensor(view.call.scale, dtype=torch.float64, device=q.device).expand(b, h, t, s)
    row = None if query is None else _kept_index(view, "query", query, view.queries)
    if key is not None:
        at = _kept_index(view, "key", key, range(s))
        return scale[:, :, row, at, None] * q[:, :, row] * k[:, :, at]
    if row is not None:
        weights = view.of_query(row).weights[:, :, 0]
        mean_key = einsum(weights * scale[:, :, row], k, "b h s, b h s d -> b h d")
        return q[:, :, row] * mean_key
    each = q * einsum(view.weights * scale, k, "b h t s, b h s d -> b h t d")
    rows = view.rows[:, None, :, None]
    return torch.where(rows, each, 0.0).sum(2) / rows.sum(2)


def _kept_index(view: View, what: str, number: int, kept: Any) -> int:
    last = len(kept) + number
    if (number < 0 and last < 0) or (number >= 0 and number not in kept):
        raise SelectionError(f"{view.where} has no {what} {number}; there are {len(kept)}: {kept}.")
    return last if number < 0 else int(kept.index(number))


def neuron_decay(trace: TraceLike, *, longest: int = 64, real: Any = None) -> DataFrame:
    """How the contribution of each dimension falls off with distance: its mean over pairs i, j at i − j (Vig 2019).

    The mean is over all pairs of tokens that count, at the distances that the mask allows to some query. It is a
    cross-correlation of q and k along the sequence, so that it is computed by a Fourier transform.

    Args:
        trace: with q, k and mask.
        longest: distances up to this one, both ways.
        real: bool or 0/1, B S: True = a real token, no padding.

    Returns:
        A pandas DataFrame with the columns of a call, ``head``, ``neuron``, ``distance`` (in keys; negative: the key
        comes later), and ``contribution``, in units of the scores.

    Raises:
        MeasureError: a call whose queries and keys are not places in one sequence, or whose scale is another for each
            key.
        SelectionError: ``longest`` is no int from 0.
        FieldNotCaptured: a field was not kept.
    """
    import pandas as pd

    longest = checks.whole("longest", longest, 0)
    return pd.concat([_neuron_decay_table(view, longest) for view in views(trace, real)], ignore_index=True)


def _neuron_decay_table(view: View, longest: int) -> DataFrame:
    at, every = distance_places(view)
    some = view.pairs.any(1)
    allowed = torch.unique(at.expand(some.shape)[some]).tolist()
    distances = [every[i] for i in allowed if abs(every[i]) <= longest]
    _check_products(view)
    scale = torch.as_tensor(view.call.scale, dtype=torch.float64, device=view.tensor("q").device)
    if scale.dim() and scale.shape[-1] > 1:
        raise MeasureError(f"neuron_decay of {view.where}: its scale is another for each key, and so for each pair.")
    positions, rows, keys = view.positions, view.rows[:, None, :, None], view.keys[:, None, :, None]
    assert positions is not None
    q = torch.where(rows, view.tensor("q").double() * scale, 0.0)
    k = torch.where(keys, view.per_head("k").double(), 0.0)
    shift = torch.tensor(distances, device=q.device)
    sums = _correlate(q, k, positions, shift)
    count = _correlate(rows.double(), keys.double(), positions, shift).round()
    made = rearrange(sums / count, "h distance d -> h d distance")
    axes = {"head": view.heads, "neuron": range(made.shape[1]), "distance": distances}
    return long_table(view, axes, {"contribution": made})


def _correlate(q: Tensor, k: Tensor, positions: Tensor, distances: Tensor) -> Tensor:
    """H N D: ``Σ_b Σ_i q_i ∘ k_{p_i − distance}`` for each of N distances, of B H T D and B H S D."""
    least, most = (int(x) for x in positions.aminmax())
    b, h, t, d = q.shape
    length, n = most - least + 1, most - least + k.shape[2] + 1
    at = (positions - least).expand(b, t)[:, None, :, None].expand(q.shape)
    placed = q.new_zeros(b, h, length, d).scatter_(2, at, q)
    # Padded to n, so that the circular correlation of the transform is the linear one.
    product: Tensor = torch.fft.rfft(placed, n, 2) * torch.fft.rfft(k, n, 2).conj()
    # The query at `least` is at place 0, so that a pair at a distance is at the distance less `least`.
    sums: Tensor = torch.fft.irfft(product.sum(0), n, 1)
    return sums[:, (distances - least) % n]
