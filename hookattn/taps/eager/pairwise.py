"""Two tensors that are broadcast against each other, an axis of each kept: scores that no matrix product makes.

``(q[:, :, None] * k[:, None]).sum(-1)`` is q·k; ``v(tanh(q[:, :, None] + k[:, None]))`` is additive attention, and
``(q[:, :, None] - k[:, None]).square().sum(-1)`` a distance. Each is a :class:`~.states.Pairwise` until its width is
summed away, and :class:`~.states.Scores` then. Only the first has scores that follow from its operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import axis_history
from .axis_history import Atom, Origin, inserted, known
from .operation import Operation, number, same_state
from .products import Label, LayoutError, Product, ProductLabels
from .states import Pairwise, Scores, State

_HEADS = "heads"
_WIDTH = "width"
_MUL = frozenset(("mul", "mul_", "__mul__", "__rmul__", "__imul__"))
# A sum over the width that is no operation of its own: the function takes both operands.
_WHOLE = {"cosine_similarity": "cosine", "pairwise_distance": "distance"}


def paired(
    name: str,
    arithmetic: str | None,
    a: Any,
    b: Any,
    out: Any,
    origin_a: Origin,
    origin_b: Origin,
    alone: bool = False,
) -> State | None:
    """What two operands make that have an axis each that the other lacks, and one in common; None: something else.

    Args:
        name: of the operation.
        arithmetic: which of the four operations it is; None: it is a function of pairs that sums over the width.
        a, b: the operands.
        out: the result.
        origin_a, origin_b: where the operands' axes come from.
        alone: one operand may be a single vector, of one query or one key.
    """
    whole = arithmetic is None
    n = out.dim() + whole
    shape_a, shape_b = ((1,) * (n - x.dim()) + tuple(x.shape) for x in (a, b))
    # One query, or one key, is an axis all the same: the other operand's dimension was put in for it.
    new_a, new_b = inserted(origin_a, n), inserted(origin_b, n)
    own_a = [i for i in range(n) if shape_b[i] == 1 and (shape_a[i] > 1 or (i in new_b and i not in new_a))]
    own_b = [i for i in range(n) if shape_a[i] == 1 and (shape_b[i] > 1 or (i in new_a and i not in new_b))]
    both = [i for i in range(n) if shape_a[i] > 1 and shape_b[i] > 1]
    # Of a function of pairs either may be one vector alone; what else is broadcast so is a gate or a norm, mostly.
    enough = own_a or own_b if whole or alone else own_a and own_b
    learned = [o.birth == "parameter" for o in (origin_a, origin_b)]
    # Learned queries are paired with keys by any of the four; learned positions are added to tokens of three axes.
    if not (enough and both) or all(learned) or (any(learned) and arithmetic != "mul" and n < 4):
        return None
    (a, layout_a), (b, layout_b) = (
        _squeezed(x, o, n, gone) for x, o, gone in ((a, origin_a, own_b), (b, origin_b, own_a))
    )
    labels_a, labels_b = ([i for i in range(n) if i not in gone] for gone in (own_b, own_a))
    state = Pairwise(
        Origin(()),
        a=a,
        b=b,
        labels_a=labels_a,
        labels_b=labels_b,
        origins=(layout_a, layout_b),
        dims=list(range(n)),
        how=arithmetic or _WHOLE[name],
    )
    if whole:
        return _scores(state, [n - 1], out, _WHOLE[name], [name])
    state.origin = Origin(out.shape, birth="lost")
    return state


def _squeezed(x: Tensor, origin: Origin, n: int, gone: Sequence[int]) -> tuple[Tensor, Origin]:
    """A tensor of ``n`` dimensions without those that only the other operand has."""
    layout = ((),) * (n - x.dim()) + origin.layout()
    full = x.detach().reshape((1,) * (n - x.dim()) + tuple(x.shape))
    kept = [i for i in range(n) if i not in gone]
    made = known(tuple(layout[i] for i in kept))
    made.birth, made.cut = origin.birth, origin.cut
    return full.squeeze(tuple(gone)), made


def changed_pairs(c: Operation) -> State | None:
    """An operation on each pair's vector by itself."""
    state: Pairwise = c.state
    if not isinstance(c.out, Tensor) or c.out.shape != c.x.shape or c.kind.shuffles:
        return None
    if c.kind.arithmetic in ("mul", "div") and c.position == 0 and (by := number(c.other())):
        return state.but(scale=state.scale * (by if c.kind.arithmetic == "mul" else 1 / by))
    return state.but(steps=[*state.steps, c.name])


def mapped_pairs(c: Operation) -> State | None:
    """A learned map of each pair's vector: to one number, or to one for each head, these are scores."""
    state: Pairwise = c.state
    if c.position != 0 or not isinstance(c.out, Tensor) or c.out.dim() != c.x.dim() or state.cut:
        return None
    last = len(state.dims) - 1
    if state.dims[last] not in state.labels_a or state.dims[last] not in state.labels_b:
        return None
    if c.out.shape[-1] == c.x.shape[-1] > 1 or c.out.shape[-1] > 64:  # a layer of a network of pairs
        return state.but(steps=[*state.steps, c.name], origin=Origin(c.out.shape, birth="lost"))
    return _scores(state, [last], c.out, _kind(state, c.name), [*state.steps, c.name])


def scores_of_pairs(state: Pairwise, dim: int, out: Tensor, name: str) -> Scores | None:
    """The scores that a learned map of the width, dimension ``dim``, makes of each pair."""
    if state.cut or any(state.dims[dim] not in labels for labels in (state.labels_a, state.labels_b)):
        return None
    return _scores(state, [dim], out, _kind(state, name), [*state.steps, name])


def summed_pairs(c: Operation) -> State | None:
    """A sum over the width: scores."""
    state: Pairwise = c.state
    dim = c.arg(1, "dim", c.arg(2, "dim") if c.name == "norm" else None)
    dims = [dim] if isinstance(dim, int) else list(dim) if isinstance(dim, (tuple, list)) else []
    dims = [d % c.x.dim() for d in dims]
    if not dims or not isinstance(c.out, Tensor) or len(state.dims) != c.x.dim():
        return None
    if any(state.dims[d] not in state.labels_a or state.dims[d] not in state.labels_b for d in dims):
        return state.but(summed=dims) if _MUL & {*state.steps} else None
    if state.cut:
        return None
    plain = c.name == "sum" and state.how == "mul" and not state.steps
    return _scores(
        state, dims, c.out, "dot" if plain else _kind(state, c.name), [] if plain else [*state.steps, c.name]
    )


def _kind(state: Pairwise, last: str) -> str:
    if state.how == "sub":
        return "distance" if last in ("sum", "norm", "mean", "amax", "max", "vector_norm") else "additive"
    return "additive" if state.how == "add" else "bilinear"


def _scores(state: Pairwise, dims: Sequence[int], out: Tensor, score: str, opaque: list[str]) -> Scores | None:
    """The scores once the dimensions ``dims`` of the pairs are summed over."""
    gone: list[Label] = [state.dims[d] for d in dims]
    kept = [x for i, x in enumerate(state.dims) if i not in dims]
    a, b, labels_a, labels_b = state.a, state.b, list[Label](state.labels_a), list[Label](state.labels_b)
    origin_a, origin_b = state.origins
    labels: list[Label] = list(kept)
    if dims and out.dim() == len(state.dims):
        # The width is there still, with one number or one for each head in its place.
        labels = [x if i not in dims else _HEADS for i, x in enumerate(state.dims)]
        if len(dims) != 1:
            return None
        heads = out.shape[dims[0]]
        atom = () if heads == 1 else (Atom(heads, role="H"),)
        a, b = (x.unsqueeze(-1).expand(*x.shape, heads) for x in (a, b))
        origin_a, origin_b = (known((*o.layout(), atom)) for o in (origin_a, origin_b))
        labels_a, labels_b = [*labels_a, _HEADS], [*labels_b, _HEADS]
    elif out.dim() != len(kept):
        return None
    if not dims:
        # Nothing is summed over: a map did that before they met. Its features stand here as one, of extent 1.
        a, b = a.unsqueeze(-1), b.unsqueeze(-1)
        width = (Atom(1, birth="feature"),)
        origin_a, origin_b = (known((*o.layout(), width)) for o in (origin_a, origin_b))
        labels_a, labels_b, gone = [*labels_a, _WIDTH], [*labels_b, _WIDTH], [_WIDTH]
    try:
        product = Product(a, b, ProductLabels(labels_a, labels_b, labels), origin_a, origin_b)
    except LayoutError:
        return None
    assert set(product.contracted) == set(gone)
    product.shape = tuple(out.shape)
    return Scores(Origin(out.shape, product.layout), product=product, scale=state.scale, opaque=opaque, score=score)


def same_pairs(c: Operation) -> State | None:
    """A view of pairs, if it leaves every axis where it is."""
    return same_state(c) if isinstance(c.out, Tensor) and c.out.shape == c.x.shape else None


def picked_pairs(c: Operation) -> State | None:
    """One position of all, or some of them: ``pairs[:, t]``."""
    state: Pairwise = c.state
    how = c.kind.axes(c.x, c.out, c.args, c.kwargs)
    if how is None or how[0] is not axis_history.keep_dims or len(state.dims) != c.x.dim() or None in how[1]:
        return None
    return state.but(dims=[state.dims[i] for i in how[1]], cut=True)


def pairs_as_scores(state: Pairwise, x: Tensor) -> Scores | None:
    """Pairs of numbers as the scores that they are: ``x``."""
    if len(state.dims) != x.dim() or state.cut:
        return None
    return _scores(state, [], x, _kind(state, ""), [*state.steps, state.how])


def added_up(c: Operation) -> State | None:
    """Pairs added up along an axis."""
    state: Pairwise = c.state
    return state.but(steps=[*state.steps, c.name])
