"""What the axes of a tensor are made of, followed through views.

A fused projection, heads folded into the batch, grouped heads repeated for the product: afterwards only the history of
a tensor tells which part of a dimension is heads. Every dimension is a product of :class:`Atom`; a view splits and
joins atoms. Two atoms split from one parent are siblings: the heads are what shares a parent with the head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Layout = tuple[tuple["Atom", ...], ...]
Shape = Sequence[int]

# Longest chain of views kept unevaluated. A layout is worked out by recursion, a call or two for each view, far below
# Python's limit of 1000; and a state that is passed on for thousands of steps (a cache of keys in a generation) shall
# not keep the history of all of them.
_MAX_DEPTH = 48


class Atom:
    """An indivisible factor of a dimension, as far as is known.

    Attributes:
        size: its extent.
        parent: the atom it was split from.
        role: ``B``, ``H``, ``T``, ``S`` or ``D`` where that is known for certain, inherited by its parts.
        repeated: its entries are copies of one another (``expand``, ``repeat_interleave``).
    """

    __slots__ = ("parent", "repeated", "role", "size")

    def __init__(self, size: int, parent: Atom | None = None, role: str | None = None, repeated: bool = False):
        self.size = size
        self.parent = parent
        self.role: str | None = role if role is not None else (parent.role if parent is not None else None)
        self.repeated: bool = repeated or (parent.repeated if parent is not None else False)

    def __repr__(self) -> str:
        return f"{self.role or '?'}{self.size}{'*' if self.repeated else ''}"

    def lineage(self) -> Iterable[Atom]:
        """Its parent, the parent's parent, and so on."""
        atom = self.parent
        while atom is not None:
            yield atom
            atom = atom.parent


class Origin:
    """Where a tensor's shape came from; its layout is worked out only if an attention call asks for it."""

    __slots__ = ("_layout", "args", "depth", "how", "parent", "piece_of", "shape")

    def __init__(
        self,
        shape: tuple[int, ...],
        how: Callable[..., Layout] | None = None,
        parent: Origin | None = None,
        args: Any = None,
    ):
        self.shape = shape
        self.how = how
        self.parent = parent
        self.args = args
        self._layout: Layout | None = None
        #: The origin that this is one of several equal pieces of (chunk, split).
        self.piece_of: Origin | None = None
        self.depth: int = 0 if parent is None else parent.depth + 1
        if self.depth > _MAX_DEPTH:
            self.layout()

    def layout(self) -> Layout:
        """The atoms of each dimension."""
        if self._layout is None:
            # What it came from is let go afterwards: an origin would else keep all that were before it.
            if self.how is None:
                self._layout = fresh(self.shape)
            elif self.parent is not None:
                self._layout = self.how(self.parent.layout(), self.shape, self.args)
            else:
                self._layout = self.how(self.shape, self.args)
            self.parent = self.args = None
            self.depth = 0
        return self._layout


def seeded(shape: Shape, roles: Sequence[str | None]) -> Origin:
    """An origin whose axes are known: one role per dimension."""
    origin = Origin(tuple(shape))
    origin._layout = tuple((Atom(n, role=r),) if n != 1 else () for n, r in zip(shape, roles, strict=True))
    return origin


def known(layout: Layout) -> Origin:
    """An origin whose layout is known."""
    origin = Origin(sizes(layout))
    origin._layout = layout
    return origin


def fresh(shape: Shape) -> Layout:
    """Nothing is known: one atom a dimension (none for an extent of 1)."""
    return tuple((Atom(n),) if n != 1 else () for n in shape)


def sizes(layout: Layout) -> tuple[int, ...]:
    """The extents of the dimensions of a layout."""
    return tuple(math.prod(a.size for a in dim) for dim in layout)


def refine(atoms: Sequence[Atom], other: Sequence[Atom]) -> list[tuple[Atom, Atom]] | None:
    """Split two factorings of one extent into a common one, in order; None if they don't fit."""
    left, right = list(atoms), list(other)
    pairs: list[tuple[Atom, Atom]] = []
    while left and right:
        a, b = left.pop(0), right.pop(0)
        n = math.gcd(a.size, b.size)
        if n not in (a.size, b.size):  # 6 and 4, say: no factor of the one is a run of entries of the other
            return None
        if a.size > n:
            left.insert(0, Atom(a.size // n, a))
            a = Atom(n, a)
        if b.size > n:
            right.insert(0, Atom(b.size // n, b))
            b = Atom(n, b)
        pairs.append((a, b))
    return pairs if not left and not right else None


# How each kind of view changes a layout: (layout, new shape, args) -> layout.


def same(layout: Layout, shape: tuple[int, ...], args: Any) -> Layout:
    """The axes are as they were."""
    return layout if sizes(layout) == shape else fresh(shape)


def reshape(layout: Layout, shape: tuple[int, ...], args: Any) -> Layout:
    """Row-major regrouping: view, reshape, flatten, unflatten, squeeze, unsqueeze."""
    # Atoms are dealt out to the new dimensions in order. One that is too large for what a dimension still needs is
    # split, and its parts are siblings: so that heads are told from the width they were split from.
    rest = [a for dim in layout for a in dim]
    if 0 in shape or any(a.size == 0 for a in rest):
        return fresh(shape)
    out: list[tuple[Atom, ...]] = []
    for extent in shape:
        dim: list[Atom] = []
        while extent > 1:
            if not rest:
                return fresh(shape)
            atom = rest.pop(0)
            if extent % atom.size == 0:
                dim.append(atom)
                extent //= atom.size
            elif atom.size % extent == 0:
                dim.append(Atom(extent, atom))
                rest.insert(0, Atom(atom.size // extent, atom))
                extent = 1
            else:
                return fresh(shape)
        out.append(tuple(dim) if extent == 1 else (Atom(extent),))
    return tuple(out) if not rest else fresh(shape)


def permute(layout: Layout, shape: tuple[int, ...], order: Sequence[int]) -> Layout:
    """Dimensions in another order."""
    return tuple(layout[i] for i in order)


def transpose(layout: Layout, shape: tuple[int, ...], dims: tuple[int, int]) -> Layout:
    """Two dimensions exchanged."""
    out, (a, b) = list(layout), dims
    out[a], out[b] = out[b], out[a]
    return tuple(out)


def mapped(layout: Layout, shape: tuple[int, ...], args: Any) -> Layout:
    """A linear map: the last dimension is another."""
    return (*layout[:-1], *fresh(shape[-1:]))


def expand(layout: Layout, shape: tuple[int, ...], args: Any) -> Layout:
    """Broadcast dimensions become repeated atoms."""
    old = ((),) * (len(shape) - len(layout)) + layout
    return tuple(
        dim if math.prod(a.size for a in dim) == n else (Atom(n, repeated=True),)
        for dim, n in zip(old, shape, strict=True)
    )


def repeat(layout: Layout, shape: tuple[int, ...], counts: Sequence[int]) -> Layout:
    """``tensor.repeat``: copies of the whole, so the repeated atom comes first."""
    old = ((),) * (len(shape) - len(layout)) + layout
    return tuple(((Atom(r, repeated=True),) if r > 1 else ()) + dim for dim, r in zip(old, counts, strict=True))


def interleave(layout: Layout, shape: tuple[int, ...], args: tuple[int, int]) -> Layout:
    """``repeat_interleave``: copies of each entry, so the repeated atom comes last."""
    dim, count = args
    extra = (Atom(count, repeated=True),) if count > 1 else ()
    return tuple(d + extra if i == dim else d for i, d in enumerate(layout))


def resized(layout: Layout, shape: tuple[int, ...], args: Any) -> Layout:
    """The same dimensions, some of another extent (slices, chunks, concatenation, padding, a linear map)."""
    if len(layout) != len(shape):
        return fresh(shape)
    return tuple(_resize(dim, n) for dim, n in zip(layout, shape, strict=True))


def _resize(dim: tuple[Atom, ...], extent: int) -> tuple[Atom, ...]:
    """Another extent of a dimension: what is left of it, or added to it, counts from its innermost axis out."""
    if math.prod(a.size for a in dim) == extent:
        return dim
    if extent == 0:
        return (Atom(0),)
    out: list[Atom] = []
    for i, atom in reversed(list(enumerate(dim))):
        if extent == 1:
            break
        if i == 0 or (extent < atom.size and atom.size % extent == 0):
            out.insert(0, Atom(extent, atom))
            extent = 1
        elif atom.size and extent % atom.size == 0:
            out.insert(0, atom)
            extent //= atom.size
        else:
            return (Atom(extent * math.prod(a.size for a in out)),)
    return tuple(out) if extent == 1 else (Atom(extent), *out)


def keep_dims(layout: Layout, shape: tuple[int, ...], kept: Sequence[int | None]) -> Layout:
    """Indexing: for every new dimension the old one it came from, or None for a new one."""
    return tuple(
        _resize(layout[i], n) if i is not None else ((Atom(n),) if n != 1 else ())
        for i, n in zip(kept, shape, strict=True)
    )


def joined(layout: Layout, shape: tuple[int, ...], args: tuple[int, int, bool]) -> Layout:
    """Equal pieces of one tensor joined along another dimension, an old one or a new: heads cut off the width, say."""
    dim, count, new = args
    # The pieces were cut off one atom, whose parts share it as a parent: the number of pieces is their sibling.
    cut = next((a.parent for d in layout for a in d if a.parent is not None), None)
    head = Atom(count, cut)
    if new:
        return (*layout[:dim], (head,), *layout[dim:])
    return tuple((head, *d) if i == dim else d for i, d in enumerate(layout))
