"""Products of two tensors with named axes, and bringing what belongs to one into the layout B H T S.

``matmul``, ``bmm``, ``baddbmm`` and two-operand ``einsum`` are one thing here: labels on the axes of two operands and
of the result. Which axes are heads, queries and keys is decided only once the softmax has told on which side the keys
are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ...torch_internals.tensor_identity import storage_of, version_of
from .axis_history import Atom, Layout, Origin, fresh, refine

Label = int | str
Side = Literal["batch", "a", "b"]


class LayoutError(Exception):
    """The axes cannot be told apart; the message says why. Never leaves the taps."""


@dataclass(slots=True)
class Piece:
    """A factor of one dimension of an operand: its extent, its role, and whether it is there only by broadcasting."""

    size: int
    role: str
    broadcast: bool = False
    repeated: bool = False


@dataclass(slots=True)
class Axis:
    """What is known of an atom of a product's result."""

    side: Side
    head: bool
    source: Atom


class Product:
    """``a · b`` with labelled axes."""

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        labels: tuple[Sequence[Label], Sequence[Label], Sequence[Label]],
        origin_a: Origin,
        origin_b: Origin,
    ):
        self.a, self.b = a, b
        self.la, self.lb, self.lo = (tuple(x) for x in labels)
        self.origin_a, self.origin_b = origin_a, origin_b
        self.versions = (version_of(a), version_of(b))
        self.shape: tuple[int, ...] = ()  # of the result, where that is needed
        self.axes: dict[Atom, Axis] = {}
        self.pairs: dict[Label, list[tuple[Atom, Atom | None, Atom | None]]] = {}
        self.contracted = [x for x in self.la if x in self.lb and x not in self.lo]
        self._roles: tuple[tuple[Atom, ...], Roles] | None = None

    @property
    def learned(self) -> bool:
        """Whether an operand is a parameter of the model."""
        return isinstance(self.a, nn.Parameter) or isinstance(self.b, nn.Parameter)

    @property
    def untouched(self) -> bool:
        """Whether neither operand was written to since."""
        return self.versions == (version_of(self.a), version_of(self.b))

    def keep(self, storage: int) -> None:
        """The memory at ``storage`` is about to be written to: copy an operand that lies in it."""
        if not self.untouched:
            return
        if storage_of(self.a) == storage:
            self.a = self.a.clone()
        if storage_of(self.b) == storage:
            self.b = self.b.clone()
        self.versions = (version_of(self.a), version_of(self.b))

    def layout(self, shape: tuple[int, ...], args: object = None) -> Layout:
        """The layout of the result; fills :attr:`axes`."""
        layout_a, layout_b = (_valid(o.layout(), t) for o, t in ((self.origin_a, self.a), (self.origin_b, self.b)))
        dims_a, dims_b = dict(zip(self.la, layout_a, strict=True)), dict(zip(self.lb, layout_b, strict=True))
        head_a, head_b = (_head_test([d[x] for x in self.contracted]) for d in (dims_a, dims_b))
        out = []
        for label, extent in zip(self.lo, shape, strict=True):
            one, two = dims_a.get(label), dims_b.get(label)
            triples: list[tuple[Atom | None, Atom | None]]
            if one and two:
                triples = list(refine(one, two) or zip(one, [None] * len(one), strict=True))
            elif one:
                triples = [(x, None) for x in one]
            else:
                triples = [(None, x) for x in two or ()]
            in_both = label in dims_a and label in dims_b
            atoms = []
            for x, y in triples:
                source = x if x is not None else y
                assert source is not None
                atom = Atom(source.size, role=source.role)
                head = any(t(s) for t, s in ((head_a, x), (head_b, y)) if s is not None)
                side: Side = "batch" if in_both else "a" if label in dims_a else "b"
                self.axes[atom] = Axis(side, head, source)
                self.pairs.setdefault(label, []).append((atom, x, y))
                atoms.append(atom)
            if math.prod(a.size for a in atoms) != extent:
                shapes = f"{tuple(self.a.shape)} and {tuple(self.b.shape)}"
                raise LayoutError(f"the axes of a product of {shapes} do not fit")
            out.append(tuple(atoms))
        return tuple(out)

    def roles(self, softmax_atoms: tuple[Atom, ...]) -> Roles:
        """The roles of the axes of the result, given those that the softmax runs over."""
        if self._roles is None or self._roles[0] != softmax_atoms:
            self._roles = softmax_atoms, Roles(self, softmax_atoms)
        return self._roles[1]

    def operand_pieces(self, which: Literal["a", "b"], roles: Roles) -> list[list[Piece]]:
        """The pieces of each dimension of an operand of the score product (``D`` the contracted ones)."""
        labels, tensor, other = (self.la, self.a, 2) if which == "b" else (self.la, self.a, 1)
        if which == "b":
            labels, tensor = self.lb, self.b
        out = []
        for label, extent in zip(labels, tensor.shape, strict=True):
            if label in self.contracted:
                out.append([Piece(extent, "D")])
                continue
            pieces = []
            for triple in self.pairs.get(label, ()):
                own = triple[other]
                pieces.append(
                    Piece(
                        triple[0].size,
                        roles.of(triple[0]),
                        broadcast=extent == 1,
                        repeated=own is not None and own.repeated,
                    )
                )
            out.append(pieces)
        return out


class Roles:
    """The role of each atom of a score product, given the atoms that the softmax runs over."""

    def __init__(self, product: Product, softmax_atoms: Sequence[Atom]):
        self.product = product
        self._known: dict[Atom, str] = {}
        self.softmaxed = {self.root(a) for a in softmax_atoms}
        sides = {product.axes[a].side for a in self.softmaxed}
        if "batch" in sides or len(sides) > 1:
            raise LayoutError("the softmax runs over an axis that is not the keys' alone")
        if sides:
            self.keys: Side = sides.pop()
        else:  # one single key: the side of the last axis of the product
            self.keys = "b" if product.lo[-1] in product.lb and product.lo[-1] not in product.la else "a"
        free = [a for a in product.axes if a not in self.softmaxed]
        queries = [a for a in free if product.axes[a].side == self.queries]
        batch = [a for a in free if product.axes[a].side != self.queries]
        self.heads: set[Atom] = {a for a in free if a.role == "H" or (a.role is None and product.axes[a].head)}
        known = bool(self.heads)
        if queries and all(a in self.heads and a.role is None for a in queries):
            # Then either heads were packed into the rows of one query, split from the same parent as the groups ...
            groups = {product.axes[a].source.parent for a in batch}
            packed = [a for a in queries if product.axes[a].source.parent in groups - {None}]
            if len(packed) != len(queries):
                self.heads.discard(queries[-1])  # ... or the innermost is the queries after all
        if not known and not any(a.role for a in batch):
            # The dimension next to the matrices is the heads by convention; a lone batch dimension is the batch.
            dims = [x for x in product.lo if x in product.la and x in product.lb]
            own = [x for x in product.lo if x not in dims and not self._softmaxed(x) and self._side(x) == self.queries]
            if len(dims) > 1:
                self.heads.update(t[0] for t in product.pairs.get(dims[-1], ()))
            elif len(own) == 2:  # keys without heads: of the queries' own dimensions the outer one is
                self.heads.update(t[0] for t in product.pairs.get(own[0], ()))

    def _side(self, label: Label) -> Side:
        return "a" if label in self.product.la else "b"

    def _softmaxed(self, label: Label) -> bool:
        return any(t[0] in self.softmaxed for t in self.product.pairs.get(label, ()))

    @property
    def queries(self) -> Side:
        """The side the queries are on."""
        return "a" if self.keys == "b" else "b"

    def root(self, atom: Atom) -> Atom:
        """The atom of the product that this one is, or was split from."""
        if atom in self.product.axes:
            return atom
        for parent in atom.lineage():
            if parent in self.product.axes:
                return parent
        raise LayoutError("an axis appeared between the scores and their use")

    def of(self, atom: Atom) -> str:
        """B, H, T or S."""
        role = self._known.get(atom)
        if role is None:
            root = self.root(atom)
            if root in self.softmaxed:
                role = "S"
            elif root in self.heads:
                role = "H"
            else:
                role = "T" if self.product.axes[root].side == self.queries else "B"
            self._known[atom] = role
        return role

    def pieces(self, layout: Layout, shape: Sequence[int] | None = None) -> list[list[Piece]]:
        """The pieces of a tensor laid out like the scores, or broadcast against them (``shape``)."""
        shape = [math.prod(a.size for a in dim) for dim in layout] if shape is None else shape
        return [
            [Piece(a.size, self.of(a), broadcast=extent == 1) for a in dim]
            for dim, extent in zip(layout, shape, strict=True)
        ]


def mixes_heads(product: Product, atoms: Sequence[Atom]) -> bool:
    """Whether these axes of a product's result are heads (or batch), all of them: a sum over them mixes heads."""
    axes = product.axes
    found = [next((a for a in (x, *x.lineage()) if a in axes), None) for x in atoms]
    return bool(found) and all(a is not None and (axes[a].side == "batch" or axes[a].head) for a in found)


def arrange(
    x: Tensor, dims: Sequence[Sequence[Piece]], roles: str, *, group: bool = False, broadcast: bool = False
) -> Tensor:
    """Bring a tensor into the given roles, one dimension each.

    Args:
        x: any tensor.
        dims: the pieces of each of its dimensions.
        roles: the target, for example ``"BHTS"``.
        group: heads that are there only as copies are left out (``k`` and ``v`` of grouped queries).
        broadcast: extents that are there only by broadcasting stay 1 (bias, mask).
    """
    pieces = [p for dim in dims for p in dim]
    if any(p.role not in roles for p in pieces):
        raise LayoutError(f"an axis in the role {next(p.role for p in pieces if p.role not in roles)} is left over")
    start = [1 if p.broadcast else p.size for p in pieces]
    if list(x.shape) != start:
        x = x.reshape(start)
    if group:
        keep = _grouped(pieces)
        if not all(keep):
            x = x[tuple(slice(None) if k else 0 for k in keep)]
            pieces = [p for p, k in zip(pieces, keep, strict=True) if k]
    had = list(x.shape)
    shape, extents = list(had), []
    order = []
    for role in roles:
        mine = [i for i, p in enumerate(pieces) if p.role == role]
        order += mine
        if not (broadcast and all(shape[i] == 1 for i in mine)):
            for i in mine:
                shape[i] = pieces[i].size
        extents.append(math.prod(shape[i] for i in mine))
    if shape != had:
        x = x.expand(shape)
    if order != sorted(order):
        x = x.permute(order)
    return x if list(x.shape) == extents else x.reshape(extents)


def _grouped(pieces: Sequence[Piece]) -> list[bool]:
    """Which pieces stay: of the heads, the trailing run of copies goes."""
    keep = [True] * len(pieces)
    for i in reversed([i for i, p in enumerate(pieces) if p.role == "H"]):
        if not (pieces[i].broadcast or pieces[i].repeated):
            break
        keep[i] = False
    return keep


def _head_test(contracted: Sequence[Sequence[Atom]]):  # type: ignore[no-untyped-def]
    """Whether an atom shares a parent with the contracted width."""
    parents = {p for dim in contracted for a in dim for p in a.lineage()}
    return lambda atom: any(p in parents for p in atom.lineage())


def _valid(layout: Layout, x: Tensor) -> Layout:
    return layout if len(layout) == x.dim() else fresh(x.shape)
