"""How attention falls off with distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from ..call_view import View
from ..frame import long_table, views_of_heads

if TYPE_CHECKING:
    from pandas import DataFrame

    from ...traces import TraceLike


def distance_decay(trace: TraceLike, *, real: Any = None) -> DataFrame:
    """The mean weight at each distance: ``mean of w_ij over all pairs with i − j = distance`` (Vig & Belinkov 2019).

    The mean is over the pairs that the mask allows, over all examples at once.

    Args:
        trace: with weights and mask.
        real: bool or 0/1, B S: True = a real token, no padding.

    Returns:
        A pandas DataFrame with the columns of a call, ``head``, ``distance`` (in keys; negative: the key comes later),
        ``weight``, and ``count``, the pairs it is the mean of. Distances at which there are none are left out.

    Raises:
        MeasureError: a call whose queries and keys are not places in one sequence.
        FieldNotCaptured: the weights or the mask were not kept.
    """
    import pandas as pd

    return pd.concat([_decay_table(view) for view in views_of_heads(trace, real)], ignore_index=True)


def _decay_table(view: View) -> DataFrame:
    at, distances = distance_places(view)
    pairs = view.pairs
    count = _sums_by_place(pairs.double(), at, len(distances)).expand(view.shape[1], -1)
    mean = _sums_by_place(torch.where(pairs, view.weights, 0.0), at, len(distances)) / count
    table = long_table(view, {"head": view.heads, "distance": distances}, {"weight": mean, "count": count.long()})
    return table[table["count"] > 0]


def distance_places(view: View) -> tuple[Tensor, range]:
    """For each query and key the place of their distance in a range of all distances: (B or 1) T S, and the range.

    Raises:
        MeasureError: there are no distances.
    """
    distance = view.distance
    least, most = (int(x) for x in distance.aminmax())
    return distance - least, range(least, most + 1)


def _sums_by_place(values: Tensor, at: Tensor, n: int) -> Tensor:
    """H n, float64: B H T S summed by place, which is (B or 1) T S."""
    b, h, t, s = values.shape
    flat = rearrange(values, "b h t s -> h (b t s)").double()
    return flat.new_zeros(h, n).index_add_(1, at.expand(b, t, s).reshape(-1), flat)
