"""Scores of several products laid end to end before one softmax: one product of the same queries with all the keys.

The keys of blocks and of global tokens, of a window and of random blocks, of the sequence itself and of another: some
models form a product with each, join the scores, run one softmax over all, and split the weights again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...torch_internals.tensor_identity import address_of
from .axis_history import Atom, Layout, Origin, known
from .decisions import decide
from .operation import Operation
from .products import Label, LayoutError, Product, ProductLabels
from .score_rules import scores_with_sink
from .states import ScatteredScores, Scores, State, Term


def concatenated_scores(c: Operation) -> State | None:
    """Scores concatenated: with a sink's column, or with those of other products."""
    tensors = c.arg(0, "tensors")
    states = [c.look(t) for t in tensors]
    if not all(isinstance(s, Scores) for s in states) or len({id(t) for t in tensors}) < len(tensors):
        return scores_with_sink(c)
    dim = c.arg(1, "dim", 0) % c.out.dim()
    try:
        return _join([s for s in states if isinstance(s, Scores)], list(tensors), dim, c.out)
    except LayoutError as error:
        return ScatteredScores(c.origin, why=f"scores of several products in one softmax: {error}")


@dataclass
class _Operand:
    """An operand of one of the products: a dimension for each of the scores' (1 where it lacks it), then the width."""

    x: Tensor
    has: list[bool]
    layout: Layout


def _join(states: Sequence[Scores], tensors: Sequence[Tensor], dim: int, out: Tensor) -> Scores:
    first = states[0]
    if any(s.scale != first.scale or s.cap != first.cap or s.factors for s in states):
        raise LayoutError("they are scaled each in its own way")
    if any(s.sink is not None for s in states):
        raise LayoutError("one of them has a sink of its own")
    pairs = [_operands(s, t, dim) for s, t in zip(states, tensors, strict=True)]
    q = pairs[0][0]
    if not all(_equal(q.x, other.x) for other, _ in pairs[1:]):
        raise LayoutError("the queries are not the same")
    n = out.dim()
    batch = [j for j in range(n) if j != dim and any(k.has[j] for _, k in pairs)]
    keys, layout = _keys([k for _, k in pairs], batch, dim, out)
    labels: list[Label] = list(range(n))
    product = Product(
        q.x.squeeze(dim),
        keys,
        ProductLabels([*labels[:dim], *labels[dim + 1 :], "width"], [*batch, dim, "width"], labels),
        known((*q.layout[:dim], *q.layout[dim + 1 :])),
        known(layout),
    )
    product.shape = tuple(out.shape)
    origin = Origin(out.shape, product.layout)
    terms = _laid(tensors, [_biases(s, t) for s, t in zip(states, tensors, strict=True)], dim, origin)
    fills = _laid(tensors, [_fills(s, t) for s, t in zip(states, tensors, strict=True)], dim, origin)
    lost = [name for s in states for name in s.opaque]
    return Scores(origin, product=product, scale=first.scale, cap=first.cap, terms=terms, fills=fills, opaque=lost)


def _operands(scores: Scores, x: Tensor, dim: int) -> tuple[_Operand, _Operand]:
    """The queries and the keys of one product, arranged like its scores."""
    product, layout = scores.product, scores.origin.layout()
    if not product.untouched:
        raise LayoutError("q or k was written to after its product")
    if len(layout) != len(product.lo) or x.dim() != len(layout):
        raise LayoutError("the axes of one of them were split or merged")
    for own, label in zip(layout, product.lo, strict=True):
        if tuple(product.atoms_of(label)) != own:
            raise LayoutError("the axes of one of them were rearranged")
    if (product.lo[dim] in product.la) == (product.lo[dim] in product.lb):
        raise LayoutError("they are not joined along the keys")
    sides = (product.a, product.la, product.origin_a, "a"), (product.b, product.lb, product.origin_b, "b")
    a, b = (_operand(product, *side) for side in sides)
    return (b, a) if product.lo[dim] in product.la else (a, b)


def _operand(product: Product, x: Tensor, labels: Sequence[Label], origin: Origin, which: str) -> _Operand:
    if set(labels) - set(product.lo) - set(product.contracted):
        raise LayoutError("a product sums over more than the width")
    own = dict(zip(labels, origin.layout(), strict=True)) if len(origin.layout()) == x.dim() else {}
    has = [label in labels for label in product.lo]
    order = [labels.index(label) for label in product.lo if label in labels]
    width = [labels.index(label) for label in product.contracted]
    shape = [x.shape[labels.index(label)] if there else 1 for label, there in zip(product.lo, has, strict=True)]
    layout: list[tuple[Atom, ...]] = []
    for label, extent in zip(product.lo, shape, strict=True):
        matched = product.matched.get(label, ()) if extent > 1 else ()
        atoms = [m.a if which == "a" else m.b for m in matched]
        layout.append(tuple(a for a in atoms if a is not None))
    if [math.prod(a.size for a in dim) for dim in layout] != shape:
        raise LayoutError("the axes of an operand are not known")
    x = x.permute(*order, *width).reshape(*shape, -1)
    inner = tuple(a for label in product.contracted for a in own.get(label, ()))
    if math.prod(a.size for a in inner) != x.shape[-1]:
        inner = (Atom(x.shape[-1]),) if x.shape[-1] != 1 else ()
    return _Operand(x, has, (*layout, inner))


def _same_place(x: Tensor, y: Tensor) -> bool:
    return address_of(x) == address_of(y) and x.stride() == y.stride() and x.shape == y.shape


def _equal(x: Tensor, y: Tensor) -> bool:
    return bool(decide(_same_place, x, y)) or (x.shape == y.shape and bool(decide(torch.equal, x, y)))


def _keys(parts: Sequence[_Operand], batch: Sequence[int], dim: int, out: Tensor) -> tuple[Tensor, Layout]:
    """All the keys, with those batch dimensions that any of them has: keys shared by every block are copied to each."""
    layout: list[tuple[Atom, ...]] = []
    extents = []
    for j in batch:
        extents.append(max(p.x.shape[j] for p in parts))
        having = [p.layout[j] for p in parts if p.x.shape[j] > 1]
        atoms = having[0] if having else ()
        copies = [[a.repeated for a in own] for own in having]
        if any(x != copies[0] for x in copies):  # not copies everywhere
            atoms = tuple(_single(a) for a in atoms)
        layout.append(atoms)
    rest = [j for j in range(out.dim()) if j != dim and j not in batch]
    laid = []
    for part in parts:
        x = part.x.permute(*rest, *batch, dim, out.dim())[(0,) * len(rest)]
        laid.append(x.expand(*extents, -1, -1))
    keys = torch.cat(laid, -2)
    return keys, (*layout, (Atom(keys.shape[-2]),), parts[0].layout[-1])


def _single(atom: Atom) -> Atom:
    made = Atom(atom.size, atom)
    made.repeated = False
    return made


def _aligned(term: Term, scores: Scores, x: Tensor) -> Tensor:
    """A term as it lies along the scores now."""
    now, then, own = scores.origin.layout(), term.origin.layout(), term.tensor
    own = own.reshape((1,) * (len(then) - own.dim()) + tuple(own.shape))
    if now == then:
        return own
    order = [then.index(dim) if dim in then else -1 for dim in now]
    if sorted(order) != list(range(len(then))):
        raise LayoutError("the axes of a bias or mask of one of them are not known")
    return own.permute(order)


def _biases(scores: Scores, x: Tensor) -> Tensor | None:
    total: Any = None
    for term in scores.terms:
        own = _aligned(term, scores, x)
        own = (own.to(x.dtype) if own.dtype == torch.bool else own) * term.factor
        total = own if total is None else total + own
    for shift in scores.shifts:
        total = -shift if total is None else total - shift
    return total if total is None or isinstance(total, Tensor) else x.new_full((1,) * x.dim(), total)


def _fills(scores: Scores, x: Tensor) -> Tensor | None:
    total = None
    for term in scores.fills:
        own = _aligned(term, scores, x)
        total = own if total is None else total | own
    return total


def _laid(tensors: Sequence[Tensor], own: Sequence[Tensor | None], dim: int, origin: Origin) -> list[Term]:
    """One term for what joined each of the parts; nothing where none has any."""
    some = [x for x in own if x is not None]
    if not some:
        return []
    n = tensors[0].dim()
    shape = [max(x.shape[j] for x in some) for j in range(n)]
    laid = []
    for tensor, mine in zip(tensors, own, strict=True):
        shape[dim] = tensor.shape[dim]
        laid.append(some[0].new_zeros(()).expand(shape) if mine is None else mine.expand(shape))
    return [Term(torch.cat(laid, dim), origin)]
