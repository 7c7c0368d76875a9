"""AtP*: attribution patching that sees through saturated softmaxes and effects that cancel."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import checks
from ...calls.call import Call
from .attribution import nodes_table, runs_of_both
from .head_table import AXES
from .metric import Metric
from .nodes import NODES, Patched, checked_nodes

if TYPE_CHECKING:
    from pandas import DataFrame


def atp_star(
    model: nn.Module,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    *,
    nodes: str | Sequence[str] = NODES,
    grad_drop: bool = True,
    by: str = "head",
) -> DataFrame:
    """AtP* of heads (Kramár et al. 2024, "AtP*: An efficient and scalable method for localizing LLM behaviour to
    components"), which estimates how large the effect of patching a node is.

    It is :func:`attribution_patching` with two changes. *Queries and keys*: the weights that the patched node gives are
    computed exactly, and what follows is linear in them, ``Σ_s (W(n_corrupt) − W)_ts · ∂m/∂W_ts``: a softmax that is
    saturated has next to no gradient, and may have a large effect all the same. *GradDrop*: a direct effect and one
    that goes through a later layer can cancel in a gradient, and do so inexactly in the model. So a backward is run for
    each of the L layers, through whose attention no gradient goes back, and ``c(n) = 1/(L−1) · Σ_l |I_l(n)|``, where
    I_l is the effect by the gradient without layer l; that of n's own layer counts as 0.

    Here the layers' attention is cut; what goes through their MLPs, which the paper cuts as well, is left in. The cost
    is two forwards, and L backwards with ``grad_drop``. A node has a magnitude at each batch entry, which are added up:
    of a metric that is a mean over the batch that is the paper's mean over inputs.

    Args:
        model: any module whose attention can be edited, see :func:`hookattn.editing`; in eval mode.
        clean, corrupt: inputs as :func:`hookattn.trace` takes them, with as many tokens and batch entries.
        metric: a function of the model's output that returns a scalar tensor.
        nodes: ``output``, ``q``, ``k``, ``v``. Of grouped heads the part of each query head.
        grad_drop: whether gradients are dropped; without, or in a model of one layer, it is ``|I(n)|`` of the whole
            gradient.
        by: ``"head"``: a node is a head at all positions (of keys: the sum of each patched alone); ``"example"``: so,
            of each batch entry; ``"position"``: a node is a head at one position, as in the paper.

    Returns:
        A pandas DataFrame as of :func:`attribution_patching`, with columns ``atp_star(output)`` and so on, none of them
        negative.

    Raises:
        InputError, SelectionError, GradientError, EditError, MeasureError: as :func:`attribution_patching`.
    """
    names = checked_nodes(nodes)
    checks.word("by", by, AXES)
    checks.flag("grad_drop", grad_drop)
    run, other = runs_of_both(model, clean, corrupt, metric)
    calls = list(run.trace)
    layers = _layers(calls)
    drops: list[list[int]] = list(layers.values()) if grad_drop and len(layers) > 1 else [[]]
    pairs = [Patched(a, b) for a, b in zip(calls, other, strict=True)]
    values: dict[str, list[Tensor | None]] = {node: [None] * len(calls) for node in names}
    for n, dropped in enumerate(drops):
        gradients = run.gradients(dropped, last=n == len(drops) - 1)
        for i, (pair, gradient) in enumerate(zip(pairs, gradients, strict=True)):
            for node in names:
                with torch.no_grad():
                    own = pair.exact(node, torch.zeros_like(gradient) if i in dropped else gradient)
                    own = own.abs() if by == "position" else own.sum(2).abs()
                own = own if by == "example" else own.sum(0)
                before = values[node][i]
                values[node][i] = own if before is None else before + own
    share = 1 / max(1, len(drops) - 1)
    made = {node: [None if x is None else x * share for x in several] for node, several in values.items()}
    said = "How large the effect of patching the head's {} is (Kramár et al. 2024)."
    return nodes_table(run, other, metric, "atp_star", said, made, by)


def _layers(calls: Sequence[Call]) -> dict[Hashable, list[int]]:
    """The places of the calls of each layer, whichever kinds of attention it has."""
    found: dict[Hashable, list[int]] = {}
    for i, call in enumerate(calls):
        site = call.site
        key = (site.stack, site.path) if site.layer is None else (site.stack, site.layer)
        found.setdefault(key, []).append(i)
    return found
