"""Attention through the layers as a flow in a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from ... import checks
from ...errors import SelectionError
from .rollout import mixing_matrices

if TYPE_CHECKING:
    from ...traces import TraceLike

# Capacities are integers of this unit. What leaves a token is 1 in all, so that no flow is beyond 32 bits.
_UNIT = 1 << 30


def flow(
    trace: TraceLike,
    queries: Sequence[int] | None = None,
    *,
    heads: str = "mean",
    residual: float = 0.5,
    start_layer: int = 0,
    real: Any = None,
) -> Tensor:
    """Attention flow (Abnar & Zuidema 2020): the maximum flow from a token of the last layer to each input token.

    The network has a node for each token of each layer, and from token i of one layer to token j of the layer before an
    edge with the capacity ``A_ij`` of :func:`hookattn.analyze.rollout`. Each pair of tokens is a maximum flow of its
    own, so that a row doesn't sum to 1, and ``queries`` times S of them are computed for each example.

    Args:
        trace, heads, residual, start_layer, real: as in :func:`hookattn.analyze.rollout`.
        queries: which tokens of the last layer, negative ones from the end; None: all.

    Returns:
        B Q S, float64: what can flow from each of the Q tokens to each input token; exact to about 1e-9 for each edge
        that a bottleneck is made of. All NaN for an example with weights that are not finite.

    Raises:
        SelectionError: a query that there isn't; and see :func:`hookattn.analyze.rollout`.
        MeasureError, FieldNotCaptured: see :func:`hookattn.analyze.rollout`.
        ImportError: scipy is missing.
    """
    chosen = None if queries is None else checks.several_ints("queries", queries)
    layers = rearrange(mixing_matrices(trace, heads, residual, start_layer, real), "l b t s -> b l t s")
    b, _, t, s = layers.shape
    chosen = list(range(t)) if chosen is None else chosen
    bad = [i for i in chosen if not -t <= i < t]
    if bad or not chosen:
        raise SelectionError(f"queries={list(chosen)}: expected tokens from {-t} to {t - 1}.")
    made = torch.full((b, len(chosen), s), torch.nan, dtype=torch.float64)
    for i in range(b):
        if bool(layers[i].isfinite().all()):
            made[i] = _maximum_flows(layers[i], [n % t for n in chosen])
    return made


def _maximum_flows(layers: Tensor, queries: Sequence[int]) -> Tensor:
    """Q S, from L T S: one example."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_flow

    # Node l·T + i is token i after l layers. Each edge leads one layer down, so that flow from a token of the top layer
    # ends in input tokens; what a token keeps of itself is an edge like any other, as A has it on its diagonal.
    depth, t, s = layers.shape
    layer, i, j = layers.nonzero(as_tuple=True)
    capacity = (layers[layer, i, j].double() * _UNIT).round().int()
    size = (depth + 1) * t
    network = csr_array(
        (capacity.cpu().numpy(), (((layer + 1) * t + i).cpu().numpy(), (layer * t + j).cpu().numpy())),
        shape=(size, size),
    )
    network.eliminate_zeros()  # what rounds to no capacity is no edge
    found = [[maximum_flow(network, depth * t + query, key).flow_value for key in range(s)] for query in queries]
    return torch.tensor(found, dtype=torch.float64) / _UNIT
