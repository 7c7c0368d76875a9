"""How much two heads agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from ...errors import MeasureError
from ..call_view import View
from ..frame import views
from .aggregate import check_alike

if TYPE_CHECKING:
    from pandas import DataFrame

    from ...traces import TraceLike

# How many entries of pairs are formed together.
_PART = 1 << 22


def head_divergence(trace: TraceLike, *, real: Any = None) -> DataFrame:
    """The Jensen-Shannon divergence of each two heads, the mean over the queries, in nats (Clark et al. 2019).

    ``JS(p, q) = H((p + q) / 2) − (H(p) + H(q)) / 2``, from 0 (the same) to ln 2 (nothing in common). What goes to
    sinks is one more key. The mean is over the queries that count in all calls.

    Args:
        trace: with weights; all calls with as many examples, queries and keys. ``trace[i : i + 1]`` compares the heads
            of one layer alone; n heads in all take n²/2 passes over their weights.
        real: bool or 0/1, B S: True = a real token, no padding.

    Returns:
        A pandas DataFrame, heads by heads, symmetric, 0 on its diagonal; both labels are (``call``, ``layer``,
        ``head``).

    Raises:
        MeasureError: no calls, calls of different sizes, or no query that counts in all of them.
        FieldNotCaptured: the weights were not kept.
    """
    import pandas as pd

    several = list(views(trace, real))
    check_alike(several, "heads can be compared", "BTS")
    for view in several:
        if view.no_distribution is not None:
            raise MeasureError(f"a divergence is of distributions: {view.where}: {view.no_distribution}.")
    rows = torch.stack([view.rows for view in several]).all(0)
    if not bool(rows.any()):
        raise MeasureError("heads can be compared over queries that count in all calls, and there are none.")
    labels = [(view.call.index, view.call.site.layer, head) for view in several for head in view.heads]
    index = pd.MultiIndex.from_tuples(labels, names=["call", "layer", "head"])
    return pd.DataFrame(_divergences(_weights_by_rows(several, rows), len(labels)).numpy(), index, index)


def _weights_by_rows(several: Sequence[View], rows: Tensor) -> Iterator[Tensor]:
    """N R S: the weights of all heads of all calls, a few of the rows that count at a time.

    Args:
        several: the calls.
        rows: bool, B T: those that count.
    """
    b, _, t, s = several[0].shape
    step = max(1, _PART // max(1, b * s * sum(view.shape[1] for view in several)))
    for start in range(0, t, step):
        some = slice(start, start + step)
        if bool(rows[:, some].any()):
            yield torch.cat([_weights_of_rows(view, some, rows[:, some]) for view in several])


def _weights_of_rows(view: View, some: slice, rows: Tensor) -> Tensor:
    part = View(view.call.at(queries=view.queries[some]), view.trace)
    return rearrange(part.weights, "b h t s -> h b t s")[:, rows]


def _divergences(parts: Iterable[Tensor], n: int) -> Tensor:
    """N N, float64, from parts of R, N R S: the mean over R."""
    one, two = torch.triu_indices(n, n, 1)
    own = both = total = torch.zeros((), dtype=torch.float64)
    r = 0
    for weights in parts:
        r += weights.shape[1]
        rest = (1 - weights.sum(-1, keepdim=True)).clamp_min(0)
        flat = torch.cat([weights, rest], -1).view(n, -1)
        flat = flat[:, flat.any(0)]  # a key that no head looks at adds nothing to any entropy; causal masks leave many
        for part in torch.split(flat, max(1, _PART // max(len(one), 1)), 1):
            own = own + torch.special.entr(part).sum(-1).double().cpu()
            both = both + torch.special.entr(part[one].add_(part[two])).sum(-1).double().cpu()
        total = total + flat.sum(-1, dtype=torch.float64).cpu()
    # H((p + q) / 2) of what H(p + q) is of, which sums to twice what each of them does.
    middle = (both + math.log(2) * (total[one] + total[two])) / 2
    made = own.new_zeros(n, n)
    made[one, two] = ((middle - (own[one] + own[two]) / 2) / r).clamp_min(0)
    return made + made.t()
