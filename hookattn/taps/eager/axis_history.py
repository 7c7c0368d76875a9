"""What the axes of a tensor are made of, followed through views.

A fused projection, heads folded into the batch, grouped heads repeated for the product: afterwards only the history of
a tensor tells which part of a dimension is heads. Every dimension is a product of :class:`Atom`; a view splits and
joins atoms. Two things are evidence of what an atom is:

- **Siblings.** Two atoms split from one parent are siblings: the heads are what shares a parent with the head width.
- **Birth.** What a learned map makes are features, and so is every part that is split from them: heads and widths.
  Positions and batch entries are there before, and go through a learned map as they are. Where an operation is not
  followed the axes of its result are *lost*: they may be anything, and whoever names them guesses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, Literal, NamedTuple

Layout = tuple[tuple["Atom", ...], ...]
# data: an axis of something given to the model, or kept through it: batch entries, positions.
# feature: what a learned map made, or sums over.
# parameter: an axis of a parameter that no map has run over: rows of learned queries, say.
# lost: of an operation that is not followed.
Birth = Literal["data", "feature", "parameter", "lost"]
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
        birth: where its line began; inherited by its parts.
        root: the atom that its line began with, through all that kept the axis: two axes of one sequence have one root.
        step: how many entries of the parent's line lie between two of its own: of two parts of one atom, the outer has
            the larger.
        maps: what identifies the learned maps that made it.
        through: of a width that a learned map made of another, that other: a map of each head by itself.
        beside: the roots of other sequences that were laid end to end with it; inherited by its parts.
    """

    birth: Birth
    __slots__ = ("_root", "beside", "birth", "maps", "parent", "repeated", "role", "size", "step", "through")

    def __init__(
        self,
        size: int,
        parent: Atom | None = None,
        role: str | None = None,
        repeated: bool = False,
        *,
        of: Atom | None = None,
        birth: Birth = "data",
        step: int | None = None,
        maps: frozenset[Any] = frozenset(),
    ):
        before = parent if parent is not None else of
        self.size = size
        self.parent = parent
        self.role: str | None = role
        self.repeated: bool = repeated
        self.birth = birth if before is None else before.birth
        # Not itself: objects that know themselves wait for a garbage collection.
        self._root: Atom | None = None if before is None else before.root
        self.maps: frozenset[Any] = maps if before is None else before.maps
        self.beside: frozenset[Atom] = frozenset() if before is None else before.beside
        self.through: Atom | None = None if before is None else before.through
        self.step: int = step if step is not None else 1 if before is None else before.step
        if before is not None and role is None:
            self.role = before.role
        if parent is not None and parent.repeated:
            self.repeated = True

    def __repr__(self) -> str:
        return f"{self.role or '?'}{self.size}{'*' if self.repeated else ''}"

    @property
    def root(self) -> Atom:
        """The atom that its line began with."""
        return self if self._root is None else self._root

    def nearest(self, known: Container[Atom]) -> Atom | None:
        """The one of some atoms that this is, or was split from; None: none of them."""
        atom: Atom | None = self
        while atom is not None and atom not in known:
            atom = atom.parent
        return atom

    def lineage(self) -> Iterable[Atom]:
        """Its parent, the parent's parent, and so on."""
        atom = self.parent
        while atom is not None:
            yield atom
            atom = atom.parent


class Cut(NamedTuple):
    """A tensor is some entries of another, along one dimension or, one entry of each, along two.

    Attributes:
        source: the origin of the other.
        dims: its dimensions that were cut.
        start: the first entry, of two dimensions as if they were one.
        stop: one after the last.
        mark: tells the tensor that was cut from others.
    """

    source: Origin
    dims: tuple[int, ...]
    start: int
    stop: int
    mark: object


class Origin:
    """Where a tensor's shape came from; its layout is worked out only if an attention call asks for it."""

    __slots__ = ("_entry_of", "_layout", "_shown", "args", "birth", "cut", "depth", "how", "parent", "shape")

    def __init__(
        self,
        shape: tuple[int, ...],
        how: Callable[..., Layout] | None = None,
        parent: Origin | None = None,
        args: Any = None,
        birth: Birth = "data",
    ):
        self.shape = shape
        #: Of the axes, where nothing is known of what they came from; ``parameter``: all of it is made of parameters.
        self.birth: Birth = birth if parent is None else parent.birth
        # What this is one entry of (``unbind``, ``select``, ``x[:, 0]``): an origin, and its dimension.
        self._entry_of: tuple[Origin, int] | None = None
        self.how = how
        self.parent = parent
        self.args = args
        self._layout: Layout | None = None
        self._shown: Layout | None = None
        #: What it was cut off, as a chunk of the queries or a head of all.
        self.cut: Cut | None = None if parent is None else parent.cut
        self.depth: int = 0 if parent is None else parent.depth + 1
        if self.depth > _MAX_DEPTH:
            self.full()

    @property
    def dropped(self) -> tuple[Atom, ...] | None:
        """The atoms of the dimension that this is one entry of; None: of none."""
        return None if self._entry_of is None else self._entry_of[0].full()[self._entry_of[1]]

    def entry_of(self, origin: Origin, dim: int) -> None:
        """Say of which dimension of a tensor this is one entry."""
        self._entry_of = origin, dim

    def layout(self) -> Layout:
        """The atoms of each dimension; of one that has an extent of 1, none."""
        if self._shown is None:
            self._shown = shown(self.full())
        return self._shown

    def full(self) -> Layout:
        """The atoms of each dimension; of one that has an extent of 1, what it is one entry of, if that is known."""
        if self._layout is None:
            # What it came from is let go afterwards: an origin would else keep all that were before it.
            if self.how is None:
                self._layout = fresh(self.shape, self.birth)
            elif self.parent is not None:
                self._layout = self.how(self.parent.full(), self.shape, self.args)
            else:
                self._layout = self.how(self.shape, self.args)
            self.parent = self.args = None
            self.depth = 0
        return self._layout


def seeded(shape: Shape, roles: Sequence[str | None], before: Origin | None = None) -> Origin:
    """An origin whose axes are known: one role per dimension; ``before``: what is known of where they come from."""
    if before is not None:
        return Origin(tuple(shape), named, before, tuple(roles))
    origin = Origin(tuple(shape))
    origin._layout = named((), origin.shape, roles)
    return origin


def named(layout: Layout, shape: tuple[int, ...], roles: Sequence[str | None]) -> Layout:
    """The axes of a layout, if it fits the shape, with the roles that somebody said they have."""
    lines: Layout = layout if sizes(layout) == shape else ((),) * len(shape)
    return tuple(
        (Atom(n, role=r, of=line[0] if line else None),) if n != 1 else ()
        for n, r, line in zip(shape, roles, lines, strict=True)
    )


def split(atom: Atom, outer: int) -> tuple[Atom, Atom]:
    """An atom as the product of two: the outer of extent ``outer``, and the inner."""
    inner = atom.size // outer
    return Atom(outer, atom, step=atom.step * inner), Atom(inner, atom)


def known(layout: Layout) -> Origin:
    """An origin whose layout is known."""
    origin = Origin(sizes(layout))
    origin._layout = layout
    return origin


def fresh(shape: Shape, birth: Birth = "lost") -> Layout:
    """Nothing is known of what the axes came from: one atom a dimension."""
    return tuple((Atom(n, birth=birth),) if n != 1 or birth != "lost" else () for n in shape)


def extent_of(dim: Iterable[Atom]) -> int:
    """How many entries a dimension has."""
    extent = 1  # a loop: this runs for every dimension of every tensor that an attention is made of
    for atom in dim:
        extent *= atom.size
    return extent


def shown(layout: Layout) -> Layout:
    """The atoms of each dimension, without those of an extent of 1."""
    return tuple(d if not d or d[0].size != 1 else () for d in layout)


def sizes(layout: Layout) -> tuple[int, ...]:
    """The extents of the dimensions of a layout."""
    return tuple([extent_of(dim) for dim in layout])


def refine(atoms: Sequence[Atom], other: Sequence[Atom]) -> list[tuple[Atom, Atom]] | None:
    """Split two factorings of one extent into a common one, in order; None if they don't fit."""
    left, right = [a for a in atoms if a.size != 1], [a for a in other if a.size != 1]
    pairs: list[tuple[Atom, Atom]] = []
    while left and right:
        a, b = left.pop(0), right.pop(0)
        n = math.gcd(a.size, b.size)
        if n not in (a.size, b.size):  # 6 and 4, say: no factor of the one is a run of entries of the other
            return None
        if a.size > n:
            a, rest = split(a, n)
            left.insert(0, rest)
        if b.size > n:
            b, rest = split(b, n)
            right.insert(0, rest)
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
    rest = [a for dim in layout for a in dim if a.size != 1]
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
                outer, inner = split(atom, extent)
                dim.append(outer)
                rest.insert(0, inner)
                extent = 1
            else:
                return fresh(shape)
        out.append(tuple(dim) if extent == 1 else (Atom(extent, birth="lost"),))
    return _with_single_entries(layout, out) if not rest else fresh(shape)


def _with_single_entries(before: Layout, after: list[tuple[Atom, ...]]) -> Layout:
    """Extents of 1 stay what they were where there are as many as before."""
    single = [dim for dim in before if extent_of(dim) == 1]
    places = [i for i, dim in enumerate(after) if not dim]
    if len(single) == len(places):
        for i, dim in zip(places, single, strict=True):
            after[i] = dim
    elif single:
        # One was made or lost. It lies beside the width where there is one, which heads are split from; else among the
        # batch dimensions, which come first.
        last = before[-1][-1] if before[-1] else None
        order = 1 if last is not None and last.birth == "feature" and last.size > 1 else -1
        places = list(range(len(after)))[::order]
        for i, dim in zip(places, before[::order], strict=False):
            extent = extent_of(dim)
            if extent != extent_of(after[i]):
                break
            if extent == 1:
                after[i] = dim
    return tuple(after)


def permute(layout: Layout, shape: tuple[int, ...], order: Sequence[int]) -> Layout:
    """Dimensions in another order."""
    return tuple(layout[i] for i in order)


def transpose(layout: Layout, shape: tuple[int, ...], dims: tuple[int, int]) -> Layout:
    """Two dimensions exchanged."""
    out, (a, b) = list(layout), dims
    out[a], out[b] = out[b], out[a]
    return tuple(out)


def mapped(layout: Layout, shape: tuple[int, ...], args: tuple[int, Any]) -> Layout:
    """A learned map of one dimension, to as many features as it now has; ``args``: the dimension, and the map."""
    if len(layout) != len(shape):
        return fresh(shape)
    dim, map_ = args[0] % len(shape), args[1]
    birth = mapped_birth(layout[dim], [a for i, d in enumerate(layout) if i != dim for a in d])
    made = Atom(shape[dim], birth=birth, maps=frozenset((map_,)))
    if layout[dim] and layout[dim][-1].parent is not None:
        made.through = layout[dim][-1]
    new = (made,)
    return tuple(new if i == dim else _resize(d, shape[i]) for i, d in enumerate(layout))


def embedded(layout: Layout, shape: tuple[int, ...], map_: Any) -> Layout:
    """A row of features for each entry."""
    return (*layout, (Atom(shape[-1], birth="feature", maps=frozenset((map_,))),))


def mapped_birth(summed: Iterable[Atom], others: Iterable[Atom]) -> Birth:
    """What a learned map makes of the axes that it sums over: features of features.

    A map over positions makes new positions: that is one which leaves an axis of features alone, and sums over another.
    """
    if any(a.birth == "feature" for a in summed):
        return "feature"
    return "data" if any(a.birth == "feature" for a in others) else "feature"


def expand(layout: Layout, shape: tuple[int, ...], args: Any) -> Layout:
    """Broadcast dimensions become repeated atoms."""
    old = ((),) * (len(shape) - len(layout)) + layout
    return tuple(dim if extent_of(dim) == n else (Atom(n, repeated=True),) for dim, n in zip(old, shape, strict=True))


def broadcast(layout: Layout, shape: tuple[int, ...], parts: Sequence[Origin]) -> Layout:
    """Several tensors broadcast against each other: each axis is of the first that has its extent."""
    aligned = [((),) * (len(shape) - len(p.shape)) + p.full() for p in parts]
    out = []
    for i, n in enumerate(shape):
        having = [one[i] for one in aligned if one[i] and extent_of(one[i]) == n]
        having.sort(key=lambda dim: any(a.repeated for a in dim))  # copies say least of what an axis is
        out.append(having[0] if having else fresh((n,))[0])
    return tuple(out)


def surrounded(layout: Layout, shape: tuple[int, ...], where: Sequence[int | None]) -> Layout:
    """A tensor in a larger one: for each dimension that of the tensor, or None for one that it is one entry of."""
    return tuple(_resize(layout[i], n) if i is not None else fresh((n,))[0] for i, n in zip(where, shape, strict=True))


def repeat(layout: Layout, shape: tuple[int, ...], counts: Sequence[int]) -> Layout:
    """``tensor.repeat``: copies of the whole, so the repeated atom comes first."""
    old = ((),) * (len(shape) - len(layout)) + layout
    return tuple(
        (Atom(r, repeated=True), *(a for a in dim if a.size != 1)) if r > 1 else dim
        for dim, r in zip(old, counts, strict=True)
    )


def interleave(layout: Layout, shape: tuple[int, ...], args: tuple[int, int]) -> Layout:
    """``repeat_interleave``: copies of each entry, so the repeated atom comes last."""
    dim, count = args
    if count == 1:
        return layout
    copies = Atom(count, repeated=True)
    return tuple((*(a for a in d if a.size != 1), copies) if i == dim else d for i, d in enumerate(layout))


def resized(layout: Layout, shape: tuple[int, ...], args: Any) -> Layout:
    """The same dimensions, some of another extent (slices, chunks, concatenation, padding, a linear map)."""
    if len(layout) != len(shape):
        return fresh(shape)
    return tuple(_resize(dim, n) for dim, n in zip(layout, shape, strict=True))


def _resize(dim: tuple[Atom, ...], extent: int) -> tuple[Atom, ...]:
    """Another extent of a dimension: what is left of it, or added to it, counts from its innermost axis out."""
    if extent_of(dim) == extent:
        return dim
    if extent == 0:
        return (Atom(0, of=dim[0]) if dim else Atom(0, birth="lost"),)
    if extent == 1:
        return (Atom(1, dim[0] if len(dim) == 1 else None, of=dim[0]),) if dim else ()
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
            return (Atom(extent * extent_of(out), birth="lost"),)
    return tuple(out) if extent == 1 else (Atom(extent, birth="lost"), *out)


def keep_dims(layout: Layout, shape: tuple[int, ...], kept: Sequence[int | None]) -> Layout:
    """Indexing: for every new dimension the old one it came from, or None for a new one.

    A new one has an atom of extent 1 that is a copy, so that it is told from an axis that happens to have one entry.
    """
    new = (Atom(1, birth="lost", repeated=True),)
    return tuple(_resize(layout[i], n) if i is not None else new for i, n in zip(kept, shape, strict=True))


def inserted(origin: Origin, dims: int) -> frozenset[int]:
    """The dimensions that indexing with None has just made, counted among ``dims`` that end with those of a tensor."""
    if origin.how is not keep_dims:
        return frozenset()
    ahead = dims - len(origin.shape)
    return frozenset(
        i + ahead for i, dim in enumerate(origin.full()) if any(a.repeated and a.size == 1 for a in dim)
    ) | frozenset(range(ahead))


def picked(layout: Layout, shape: tuple[int, ...], args: Sequence[int | tuple[int, ...] | None]) -> Layout:
    """Entries picked by numbers: for each new dimension the old one that its entries are of, several, or None."""
    out = []
    for source, n in zip(args, shape, strict=True):
        if source is None:
            out.append(fresh((n,))[0])
        elif isinstance(source, int):
            out.append(_resize(layout[source], n))
        else:  # entries of several dimensions, one after the other
            atoms = [a for i in source for a in layout[i]]
            out.append((Atom(n, of=atoms[0]),) if atoms and n != 1 else fresh((n,))[0])
    return tuple(out)


def columns(layout: Layout, shape: tuple[int, ...], args: Any) -> Layout:
    """``F.unfold``, B C Y X: places in a window join the channels, and the windows are positions as the pixels are."""
    pixels = [*layout[2], *layout[3]]
    channels = extent_of(layout[1])
    if not pixels or not channels or shape[1] % channels:
        return fresh(shape)
    inside = (Atom(shape[1] // channels, of=pixels[0]),) if shape[1] > channels else ()
    windows = (Atom(shape[2], of=pixels[0]),) if shape[2] != 1 else ()
    return (layout[0], (*layout[1], *inside), windows)


def windowed(layout: Layout, shape: tuple[int, ...], dim: int) -> Layout:
    """``x.unfold``: a dimension becomes the number of windows, and a last one the places in a window."""
    inside = tuple(Atom(shape[-1], of=layout[dim][0]) for _ in (0,) if layout[dim] and shape[-1] != 1)
    return (*(_resize(d, n) for d, n in zip(layout, shape[:-1], strict=True)), inside)


def pairs_as_numbers(layout: Layout, shape: tuple[int, ...], args: Any) -> Layout:
    """``view_as_complex``: the last dimension, of two, is a number now."""
    if len(layout) < 2 or layout[-2] or not layout[-1]:
        return layout[:-1]
    return (*layout[:-2], (Atom(1, layout[-1][0]),))  # a single number is what is left of the width


def numbers_as_pairs(layout: Layout, shape: tuple[int, ...], args: Any) -> Layout:
    """``view_as_real``: a last dimension of two, which is a part of the width."""
    inner = layout[-1][-1] if layout and layout[-1] else None
    return (*layout, (Atom(2, inner) if inner is not None else Atom(2, birth="lost"),))


def joined(layout: Layout, shape: tuple[int, ...], args: tuple[int, bool, Sequence[Origin]]) -> Layout:
    """Tensors laid end to end along a dimension, or stacked along a new one.

    Args:
        layout: of the one whose axes the result has.
        shape: of the result.
        args: the dimension, whether it is new, and the origins of the tensors.
    """
    dim, new, parts = args
    count = len(parts)
    extent = shape[dim] // count if not new and shape[dim] % count == 0 else 0
    if count > 1 and (new or all(p.shape == parts[0].shape and p.shape[dim] == extent for p in parts)):
        made = _number_of(parts, None if new else dim)
        if made is not None:
            return _with(layout, dim, new, made)
    if new:
        return _with(layout, dim, new, Atom(count, birth="lost"))
    laid = [p.layout() for p in parts]
    ends = [one[dim] for one in laid if len(one) == len(shape)]
    return tuple(
        _end_to_end(d, n, ends) if i == dim else _resize(d, n)
        for i, (d, n) in enumerate(zip(layout, shape, strict=True))
    )


def _end_to_end(first: tuple[Atom, ...], extent: int, parts: Sequence[tuple[Atom, ...]]) -> tuple[Atom, ...]:
    """A dimension that several were laid end to end along.

    Args:
        first: that of the one whose axes the result has.
        extent: of all together.
        parts: those of all, as far as they are known.
    """
    out = _resize(first, extent)
    atoms = [a for part in parts for a in part]
    # Of positions of an image, which lie along two axes, the first stands for both.
    roots = frozenset(part[0].root for part in parts if part).union(*(a.beside for a in atoms))
    if len(roots) > 1 and all(a.birth in ("data", "parameter") for a in atoms):
        if any(a.birth == "lost" for a in out) and first:
            out = (Atom(extent, of=first[0]),)
        for atom in out:
            if atom not in first:
                atom.beside = roots - {atom.root}
    return out


def _with(layout: Layout, dim: int, new: bool, atom: Atom) -> Layout:
    head = (atom,) if atom.size != 1 else ()
    if new:
        return (*layout[:dim], head, *layout[dim:])
    return tuple((*head, *(a for a in d if a.size != 1)) if i == dim else d for i, d in enumerate(layout))


def _number_of(parts: Sequence[Origin], dim: int | None) -> Atom | None:
    """What the number of some tensors of one shape counts; None where nothing tells.

    - Entries of a dimension, where each is one of them (``x[:, 0]``, ``x[:, 1]``, …).
    - Equal pieces that a dimension was cut into: heads that were cut off the width, say.
    - Heads, where each was made from the same by a map of its own.

    Args:
        parts: the tensors' origins.
        dim: the dimension that they are laid end to end along; None: a new one.
    """
    count, dropped = len(parts), [p.dropped for p in parts]
    first = dropped[0]
    if first is not None and all(d is not None and d == first for d in dropped):
        return first[0] if len(first) == 1 and first[0].size == count else None
    layouts = [p.full() for p in parts]
    for i in range(len(layouts[0])):
        cuts = [one[i][0] if len(one[i]) == 1 else None for one in layouts]
        whole = cuts[0].parent if cuts[0] is not None else None
        if whole is None or any(c is None or c.parent is not whole for c in cuts) or i == dim:
            continue
        if len({id(c) for c in cuts}) < count:  # a part of a dimension that all of them have
            continue
        if whole.size == count * parts[0].shape[i]:
            return Atom(count, whole, step=whole.step * parts[0].shape[i])
    same_axes = all(
        tuple(a for d in one for a in d if a.birth != "feature")
        == tuple(a for d in layouts[0] for a in d if a.birth != "feature")
        for one in layouts[1:]
    )
    maps = [frozenset[Any]().union(*(a.maps for d in one for a in d)) for one in layouts]
    own = [m.difference(*maps[:i], *maps[i + 1 :]) for i, m in enumerate(maps)]
    return Atom(count, birth="feature", maps=frozenset().union(*own)) if same_axes and all(own) else None
