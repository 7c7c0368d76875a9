"""How much two heads agree, and which heads are of a kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MeasureError, SelectionError
from .aggregate import check_alike
from .frame import views

if TYPE_CHECKING:
    from pandas import DataFrame

    from ..trace import Trace

# How many entries of pairs are formed together.
_PART = 1 << 21


def head_divergence(trace: Trace, *, real: Any = None) -> DataFrame:
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

    several = views(trace, real)
    check_alike(several, "heads can be compared", "BTS")
    rows = torch.stack([view.rows for view in several]).all(0)
    if not bool(rows.any()):
        raise MeasureError("heads can be compared over queries that count in all calls, and there are none.")
    weights = torch.cat([view.weights.transpose(0, 1)[:, rows] for view in several])
    labels = [(view.call.index, view.call.site.layer, head) for view in several for head in view.heads]
    index = pd.MultiIndex.from_tuples(labels, names=["call", "layer", "head"])
    return pd.DataFrame(_divergences(weights).numpy(), index, index)


def _divergences(weights: Tensor) -> Tensor:
    """N N, float64, from N R S: the mean over R."""
    n, r, _ = weights.shape
    rest = (1 - weights.sum(-1, keepdim=True)).clamp_min(0)
    flat = torch.cat([weights, rest], -1).view(n, -1)
    flat = flat[:, flat.any(0)]
    one, two = torch.triu_indices(n, n, 1, device=flat.device)
    own, total = flat.new_zeros(n, dtype=torch.float64), flat.new_zeros(len(one), dtype=torch.float64)
    for part in torch.split(flat, max(1, _PART // max(len(one), 1)), 1):
        own += _entropy(part)
        total += _entropy((part[one] + part[two]) / 2)
    made = own.new_zeros(n, n)
    made[one, two] = ((total - (own[one] + own[two]) / 2) / r).clamp_min(0)
    return (made + made.t()).cpu()


def _entropy(p: Tensor) -> Tensor:
    """``−Σ p ln p`` along the last axis, float64."""
    return -(p.clamp_min(torch.finfo(p.dtype).tiny).log().mul_(p)).sum(-1, dtype=torch.float64)


def cluster_heads(divergence: DataFrame, clusters: int, *, method: str = "average") -> DataFrame:
    """Groups of heads that look alike, and a place for each in the plane.

    The distance of two heads is the root of their divergence, which is a metric (Endres & Schindelin 2003). Groups are
    those of a hierarchical clustering; places are those of classical multidimensional scaling (Torgerson 1952), as in
    the figure of Clark et al. 2019.

    Args:
        divergence: of :func:`head_divergence`.
        clusters: how many groups at most.
        method: of ``scipy.cluster.hierarchy.linkage``: ``average``, ``complete``, ``single``, ``weighted``.

    Returns:
        A pandas DataFrame with the same labels: ``cluster``, from 1; ``order``, its place among the leaves of the
        tree; ``x`` and ``y``.

    Raises:
        MeasureError: fewer than two heads, or a divergence that is NaN.
        SelectionError: ``clusters`` or ``method`` is none there is.
        ImportError: scipy is missing.
    """
    import numpy as np
    import pandas as pd
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
    from scipy.spatial.distance import squareform

    methods = ("average", "complete", "single", "weighted")
    if method not in methods:
        raise SelectionError(f"method={method!r}: expected one of {', '.join(methods)}.")
    if type(clusters) is not int or clusters < 1:
        raise SelectionError(f"clusters={clusters!r}: expected an int from 1.")
    values = divergence.to_numpy(float)
    n = len(values)
    if n < 2 or not np.isfinite(values).all():
        raise MeasureError(f"cluster_heads: {n} heads; expected two or more, and no NaN between them.")
    tree = linkage(squareform(np.sqrt(values), checks=False), method)
    middle = np.eye(n) - 1 / n
    size, axes = np.linalg.eigh(-middle @ values @ middle / 2)
    places = axes[:, :-3:-1] * np.sqrt(size[:-3:-1].clip(0))
    return pd.DataFrame(
        {
            "cluster": fcluster(tree, clusters, "maxclust"),
            "order": np.argsort(leaves_list(tree)),
            "x": places[:, 0],
            "y": places[:, 1],
        },
        divergence.index,
    )
