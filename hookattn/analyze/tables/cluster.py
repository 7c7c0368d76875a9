"""Which heads are of a kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ... import checks
from ...errors import MeasureError

if TYPE_CHECKING:
    from pandas import DataFrame

METHODS = ("average", "complete", "single", "weighted")


def cluster_heads(divergence: DataFrame, clusters: int, *, method: str = "average") -> DataFrame:
    """Groups of heads that look alike, and a place for each in the plane.

    The distance of two heads is the root of their divergence, which is a metric (Endres & Schindelin 2003). Groups are
    those of a hierarchical clustering; places are those of classical multidimensional scaling (Torgerson 1952), as in
    the figure of Clark et al. 2019.

    Args:
        divergence: of :func:`hookattn.analyze.head_divergence`.
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

    checks.word("method", method, METHODS)
    clusters = checks.whole("clusters", clusters, 1)
    checks.one_of("divergence", divergence, pd.DataFrame, "the table of hookattn.analyze.head_divergence(trace)")
    try:
        values = divergence.to_numpy(float)
    except (TypeError, ValueError):
        values = np.empty((0, 1))
    if values.shape[0] != values.shape[1]:
        raise MeasureError(
            f"divergence: expected heads by heads, as hookattn.analyze.head_divergence(trace) gives them; got a table "
            f"of {divergence.shape[0]} rows and {divergence.shape[1]} columns."
        )
    n = len(values)
    if n < 2 or not np.isfinite(values).all():
        raise MeasureError(f"cluster_heads: {n} heads; expected two or more, and no NaN between them.")
    tree = linkage(squareform(np.sqrt(values), checks=False), method)
    # Classical scaling: the divergence is the squared distance; centred twice, its eigenvectors are the coordinates.
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
