"""Products of two tensors with named axes, and bringing what belongs to one into the layout B H T S.

``matmul``, ``bmm``, ``baddbmm`` and two-operand ``einsum`` are one thing here: labels on the axes of two operands and
of the result. Which axes are heads, queries and keys is decided only once the softmax has told on which side the keys
are.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from ...torch_internals.tensor_identity import storage_of, version_of
from .axis_history import Atom, Layout, Origin, fresh, refine

Label = int | str
Side = Literal["batch", "a", "b"]


class LayoutError(Exception):
    """The axes cannot be told apart; the message says why. Never leaves the taps."""


class ProductLabels(NamedTuple):
    """The labels of a product's axes, as in an einsum: of its two operands and of its result."""

    a: Sequence[Label]
    b: Sequence[Label]
    out: Sequence[Label]


@dataclass(slots=True)
class Factor:
    """A factor of one dimension of a tensor that is brought into B H T S.

    Attributes:
        size: its extent.
        role: ``B``, ``H``, ``T``, ``S`` or ``D``.
        broadcast: it is there only by broadcasting; the tensor's own extent is 1.
        repeated: its entries are copies of one another.
    """

    size: int
    role: str
    broadcast: bool = False
    repeated: bool = False


@dataclass(slots=True)
class Axis:
    """What is known of an atom of a product's result.

    Attributes:
        side: the operand that it comes from; ``batch``: both.
        head: whether it was split from the same parent as the width that the product sums over.
        source: the operand's atom.
    """

    side: Side
    head: bool
    source: Atom


class MatchedAtoms(NamedTuple):
    """An atom of a product's result, and the atoms of the operands that it comes from; None: the operand has none."""

    out: Atom
    a: Atom | None
    b: Atom | None


class Product:
    """``a · b`` with labelled axes.

    Attributes:
        a, b: the operands.
        la, lb, lo: the labels of their axes and of the result's.
        origin_a, origin_b: where the operands' axes come from.
        shape: of the result.
        contracted: the labels that are summed over.
        axes: what is known of each atom of the result; filled by :meth:`layout`.
        matched: for each label of the result, its atoms beside the operands'; filled by :meth:`layout`.
    """

    def __init__(self, a: Tensor, b: Tensor, labels: ProductLabels, origin_a: Origin, origin_b: Origin):
        self.a, self.b = a, b
        self.la, self.lb, self.lo = (tuple(x) for x in labels)
        self.origin_a, self.origin_b = origin_a, origin_b
        self.versions = (version_of(a), version_of(b))
        self.shape: tuple[int, ...] = ()
        self.axes: dict[Atom, Axis] = {}
        self.matched: dict[Label, list[MatchedAtoms]] = {}
        self.contracted = [x for x in self.la if x in self.lb and x not in self.lo]
        # Asked for by every term, mask and operand of one call, and by all uses of one softmax: made once.
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
        """The layout of the result; fills :attr:`axes` and :attr:`matched`.

        It has the signature of the functions of :mod:`.axis_history`: the result's origin calls it, if ever.
        """
        layout_a, layout_b = (_valid(o.layout(), t) for o, t in ((self.origin_a, self.a), (self.origin_b, self.b)))
        dims_a, dims_b = dict(zip(self.la, layout_a, strict=True)), dict(zip(self.lb, layout_b, strict=True))
        # Heads and the width of a head were split from one dimension of a projection: what shares a parent with the
        # width that is summed over is heads.
        width_a, width_b = ({p for x in self.contracted for a in d[x] for p in a.lineage()} for d in (dims_a, dims_b))
        out = []
        for label, extent in zip(self.lo, shape, strict=True):
            in_a, in_b = label in dims_a, label in dims_b
            side: Side = "batch" if in_a and in_b else "a" if in_a else "b"
            atoms = []
            for x, y in _matched(dims_a.get(label, ()), dims_b.get(label, ())):
                source = x if x is not None else y
                assert source is not None
                atom = Atom(source.size, role=source.role)
                head = _shares_parent(x, width_a) or _shares_parent(y, width_b)
                self.axes[atom] = Axis(side, head, source)
                self.matched.setdefault(label, []).append(MatchedAtoms(atom, x, y))
                atoms.append(atom)
            if math.prod(a.size for a in atoms) != extent:
                shapes = f"{tuple(self.a.shape)} and {tuple(self.b.shape)}"
                raise LayoutError(f"the axes of a product of {shapes} do not fit")
            out.append(tuple(atoms))
        return tuple(out)

    def atoms_of(self, label: Label) -> list[Atom]:
        """The atoms of one axis of the result; none where its extent is 1."""
        return [m.out for m in self.matched.get(label, ())]

    def roles(self, softmax_atoms: tuple[Atom, ...]) -> Roles:
        """The roles of the axes of the result, given those that the softmax runs over."""
        if self._roles is None or self._roles[0] != softmax_atoms:
            self._roles = softmax_atoms, Roles(self, softmax_atoms)
        return self._roles[1]

    def operand_factors(self, which: Literal["a", "b"], roles: Roles) -> list[list[Factor]]:
        """The factors of each dimension of an operand of the score product (``D``: those that are summed over)."""
        labels, tensor = (self.la, self.a) if which == "a" else (self.lb, self.b)
        out = []
        for label, extent in zip(labels, tensor.shape, strict=True):
            if label in self.contracted:
                out.append([Factor(extent, "D")])
                continue
            factors = []
            for matched in self.matched.get(label, ()):
                own = matched.a if which == "a" else matched.b
                repeated = own is not None and own.repeated
                factors.append(
                    Factor(matched.out.size, roles.of(matched.out), broadcast=extent == 1, repeated=repeated)
                )
            out.append(factors)
        return out


class Roles:
    """The role of each atom of a score product, given the atoms that the softmax runs over.

    What the softmax runs over are the keys; the side they are on is ``k``, and the other is ``q``. Of what is left,
    heads are told from queries and batch entries by what is known of them, and by convention where nothing is.

    Attributes:
        keys: the side of the keys.
        softmaxed: the atoms that the softmax runs over.
        heads: the atoms that are heads.
    """

    def __init__(self, product: Product, softmax_atoms: Sequence[Atom]):
        self.product = product
        self._known: dict[Atom, str] = {}
        self.softmaxed = {self.root(a) for a in softmax_atoms}
        self.keys = self._side_of_keys()
        free = [a for a in product.axes if a not in self.softmaxed]
        queries = [a for a in free if product.axes[a].side == self.queries]
        batch = [a for a in free if product.axes[a].side != self.queries]
        self.heads: set[Atom] = {a for a in free if a.role == "H" or (a.role is None and product.axes[a].head)}
        known = bool(self.heads)
        if queries and self._all_guessed_heads(queries) and not self._packed_groups(queries, batch):
            # A call has queries: what is innermost on their side is them,
            # although its history looks like that of heads.
            self.heads.discard(queries[-1])
        if not known and not any(a.role for a in batch):
            self.heads.update(self._heads_by_convention())

    def _side_of_keys(self) -> Side:
        sides = {self.product.axes[a].side for a in self.softmaxed}
        if "batch" in sides or len(sides) > 1:
            raise LayoutError("the softmax runs over an axis that is not the keys' alone")
        if sides:
            return sides.pop()
        # One single key leaves no atom: its side is that of the last axis of the product, where keys usually are.
        last = self.product.lo[-1]
        return "b" if last in self.product.lb and last not in self.product.la else "a"

    def _all_guessed_heads(self, atoms: Sequence[Atom]) -> bool:
        """Whether all these were taken for heads because of their history, and none because its role is known."""
        return all(a in self.heads and a.role is None for a in atoms)

    def _packed_groups(self, queries: Sequence[Atom], batch: Sequence[Atom]) -> bool:
        """Whether the query heads of a group are the rows of one query.

        Grouped attention over one new token may fold the heads that share a key into the rows of the product. They
        were then split from the same parent as the groups, which are on both sides.
        """
        axes = self.product.axes
        groups = {axes[a].source.parent for a in batch} - {None}
        return all(axes[a].source.parent in groups for a in queries)

    def _heads_by_convention(self) -> list[Atom]:
        """The heads where no history tells of any."""
        product = self.product
        dims = [x for x in product.lo if x in product.la and x in product.lb]
        if len(dims) > 1:  # the batch dimension next to the matrices; a lone one is the batch
            return product.atoms_of(dims[-1])
        own = [x for x in product.lo if x not in dims and not self._softmaxed(x) and self._side(x) == self.queries]
        # Keys without heads, shared by all: of the queries' own two dimensions the outer one is the heads.
        return product.atoms_of(own[0]) if len(own) == 2 else []

    def _side(self, label: Label) -> Side:
        return "a" if label in self.product.la else "b"

    def _softmaxed(self, label: Label) -> bool:
        return any(a in self.softmaxed for a in self.product.atoms_of(label))

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

    def factors(self, layout: Layout, shape: Sequence[int] | None = None) -> list[list[Factor]]:
        """The factors of a tensor laid out like the scores, or broadcast against them (``shape``)."""
        shape = [math.prod(a.size for a in dim) for dim in layout] if shape is None else shape
        return [
            [Factor(a.size, self.of(a), broadcast=extent == 1) for a in dim]
            for dim, extent in zip(layout, shape, strict=True)
        ]


def mixes_heads(product: Product, atoms: Sequence[Atom]) -> bool:
    """Whether these axes of a product's result are heads (or batch), all of them: a sum over them mixes heads."""
    axes = product.axes
    found = [next((a for a in (x, *x.lineage()) if a in axes), None) for x in atoms]
    return bool(found) and all(a is not None and (axes[a].side == "batch" or axes[a].head) for a in found)


def arrange(
    x: Tensor, dims: Sequence[Sequence[Factor]], roles: str, *, group: bool = False, broadcast: bool = False
) -> Tensor:
    """Bring a tensor into the given roles, one dimension each.

    Args:
        x: any tensor.
        dims: the factors of each of its dimensions.
        roles: the target, for example ``"BHTS"``.
        group: heads that are there only as copies are left out (``k`` and ``v`` of grouped queries).
        broadcast: extents that are there only by broadcasting stay 1 (bias, mask).
    """
    factors = [f for dim in dims for f in dim]
    left_over = next((f.role for f in factors if f.role not in roles), None)
    if left_over is not None:
        raise LayoutError(f"an axis in the role {left_over} is left over")
    split = [1 if f.broadcast else f.size for f in factors]
    if list(x.shape) != split:
        x = x.reshape(split)
    if group:
        keep = _grouped(factors)
        if not all(keep):
            x = x[tuple(slice(None) if k else 0 for k in keep)]
            factors = [f for f, k in zip(factors, keep, strict=True) if k]
    by_role = [[i for i, f in enumerate(factors) if f.role == role] for role in roles]
    shape = list(x.shape)
    for mine in by_role:
        if not (broadcast and all(shape[i] == 1 for i in mine)):
            for i in mine:
                shape[i] = factors[i].size
    # Each step is left out where it changes nothing: this runs for every tensor of every call.
    if shape != list(x.shape):
        x = x.expand(shape)
    order = [i for mine in by_role for i in mine]
    if order != sorted(order):
        x = x.permute(order)
    extents = [math.prod(shape[i] for i in mine) for mine in by_role]
    return x if list(x.shape) == extents else x.reshape(extents)


def _grouped(factors: Sequence[Factor]) -> list[bool]:
    """Which factors stay: of the heads, the trailing run of copies goes.

    Only a trailing one: query head h reads key head h // n, as the contract has it, where the copies are innermost.
    """
    keep = [True] * len(factors)
    for i in reversed([i for i, f in enumerate(factors) if f.role == "H"]):
        if not (factors[i].broadcast or factors[i].repeated):
            break
        keep[i] = False
    return keep


def _matched(a: Sequence[Atom], b: Sequence[Atom]) -> list[tuple[Atom | None, Atom | None]]:
    """The atoms of one axis that come from either operand, side by side; of both where both have it."""
    if a and b:
        # Factorings that do not fit each other: those of the first count.
        return list(refine(a, b) or ((x, None) for x in a))
    return [(x, None) for x in a] + [(None, y) for y in b]


def _shares_parent(atom: Atom | None, parents: Container[Atom]) -> bool:
    return atom is not None and any(p in parents for p in atom.lineage())


def _valid(layout: Layout, x: Tensor) -> Layout:
    return layout if len(layout) == x.dim() else fresh(x.shape)
