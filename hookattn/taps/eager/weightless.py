"""What multiplies positions by data and forms no weights: linear attention, and states that are carried along."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .axis_history import Atom
from .decisions import decide, is_zero
from .products import Label, Product
from .states import Pairwise, Scores, State

SUMMED = "keys and values are summed over positions before a query meets them (linear attention): no weights are formed"
CARRIED = (
    "products of two activations are added up from position to position before a third meets them (a state space, or"
    " causal linear attention): no weights are formed"
)
POOLED = "positions are averaged with a softmax for each feature by itself (a gate): no weights of queries and keys"
_JOINS = frozenset(("add", "sub", "rsub", "__add__", "__radd__", "__sub__", "__rsub__"))
_ADDS = frozenset(("cumsum", "add", "__add__", "__radd__", "__iadd__", "add_"))


def sums_of_positions(state: Scores, labels: Sequence[Label], contracted: Sequence[Label]) -> str | None:
    """What a product of two activations is, if a third activation is multiplied with it over features of one of them.

    Args:
        state: the product of the two.
        labels: the labels of its axes in the product with the third.
        contracted: those of them that are summed over.
    """
    of, layout = state.product, state.origin.layout()
    if state.composed or len(layout) != len(labels) or "parameter" in (of.origin_a.birth, of.origin_b.birth):
        return None
    summed = {
        of.axes[root].side
        for x, dim in zip(labels, layout, strict=True)
        if x in contracted
        for a in dim
        if (root := a.nearest(of.axes)) is not None
    }
    if len(summed) != 1 or "batch" in summed or not _features(of, "a") or not _features(of, "b"):
        return None
    widths = [a for side in of.widths.values() for a in side if a.size > 1]
    if not widths:
        shared = [dim if all(x.side == "batch" for x in map(of.axes.get, dim) if x) else None for dim in layout]
        along = "cumsum" in state.opaque or not _at_each_position(shared)
        return CARRIED if along and (state.terms or _ADDS & {*state.opaque}) else None
    if any(a.birth not in ("data", "lost") for a in widths) or state.before is not None or of.of_one:
        return None
    return SUMMED


def delta_rule(state: Scores, other: State | None) -> bool:
    """Whether a product with what may be scores is a step of a delta rule, computed for many positions at once.

    There each position's value is corrected by what is remembered at its key. Within a chunk of positions that is the
    inverse of k·kᵀ, whose rows are made of one another; of the first chunk nothing is remembered yet.

    Args:
        state: the scores, if they are any.
        other: what the other operand is, if it is followed.
    """
    if state.composed or state.product.learned:
        return False
    inverted = bool(state.steps) and any(x.name == "setitem" and x.by is None for x in state.steps)
    return inverted or _corrected(state) or _corrected(other)


def _corrected(state: State | None) -> bool:
    """Whether a tensor was joined with what an empty state gave: a product with zeros that are not learned."""
    if not isinstance(state, Scores) or _JOINS.isdisjoint(state.opaque):
        return False
    of = state.product
    return any(not isinstance(x, nn.Parameter) and decide(is_zero, x) for x in (of.a, of.b))


def _at_each_position(shared: Sequence[Sequence[Atom] | None]) -> bool:
    """Whether something is computed at each position for itself, so that nothing is carried from one to the next.

    Args:
        shared: the axes that both operands of a product have, in its order; None: one that only one of them has. The
            outermost is the batch.
    """
    return any(dim and all(a.birth != "feature" and a.size > 1 for a in dim) for dim in shared[1:])


def _features(of: Product, side: str) -> bool:
    """Whether all that an operand alone has is features."""
    own = [x for x in of.axes.values() if x.side == side and x.source.size > 1]
    return bool(own) and all(any(s.birth == "feature" for s in x.sources) for x in own)


def carried_pairs(state: Pairwise, dims: Sequence[int]) -> str | None:
    """The same of products that broadcasting made, where dimensions of the pairs are summed over."""
    if state.how != "mul" or not _ADDS & {*state.steps}:
        return None
    of_a = dict(zip(state.labels_a, state.origins[0].layout(), strict=True))
    shared = [of_a[x] if x in of_a and x in state.labels_b else None for x in state.dims]
    if not state.cut and "cumsum" not in state.steps and _at_each_position(shared):
        return None
    for labels, other, origin in (
        (state.labels_a, state.labels_b, state.origins[0]),
        (state.labels_b, state.labels_a, state.origins[1]),
    ):
        own = [labels.index(state.dims[d]) for d in dims if state.dims[d] in labels and state.dims[d] not in other]
        if own and len(own) == len(dims):
            layout = origin.layout()
            return CARRIED if all(a.birth == "feature" for i in own for a in layout[i]) else None
    return None
