"""Products of two tensors with named axes, and bringing what belongs to one into the layout B H T S.

``matmul``, ``bmm``, ``baddbmm`` and two-operand ``einsum`` are one thing here: labels on the axes of two operands and
of the result. Which axes are heads, queries and keys is decided only once the softmax has told on which side the keys
are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...attention.kernel_call import KERNEL_BASIS
from ...torch_internals.tensor_identity import address_of, storage_of
from .axis_history import Atom, Birth, Layout, Origin, extent_of, fresh, mapped_birth, refine, sizes
from .decisions import decide, version_then
from .view_rules import map_of

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
        place: among those of its role, from the outermost on: the same in every tensor of a call, however it lies.
    """

    size: int
    role: str
    broadcast: bool = False
    repeated: bool = False
    place: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class Axis:
    """What is known of an atom of a product's result.

    Attributes:
        side: the operand that it comes from; ``batch``: both.
        head: whether it has its line, or the learned map that made it, in common with the width that is summed over.
        source: the operand's atom.
        sources: of both operands, those that have it.
    """

    side: Side
    head: bool
    source: Atom
    sources: tuple[Atom, ...] = ()


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
        single: of each atom of a dimension with an extent of 1, the label; filled by :meth:`layout`.
        widths: the atoms that are summed over, of either operand; filled by :meth:`layout`.
        log_sums: whether the logsumexp of its rows was taken, as for a merge of blocks of keys.
        path: the module that it ran in, where a listener may be asked about it.
        given: asked for what the user said of the axes of the queries, a letter for each; None: nothing.
        dtype: that autocast casts the operands to inside the product; None: nothing is known of it.
    """

    def __init__(self, a: Tensor, b: Tensor, labels: ProductLabels, origin_a: Origin, origin_b: Origin):
        self.a, self.b = a, b
        self.la, self.lb, self.lo = (tuple(x) for x in labels)
        self.origin_a, self.origin_b = origin_a, origin_b
        self.versions = (version_then(a), version_then(b))
        self.shape: tuple[int, ...] = ()
        self.axes: dict[Atom, Axis] = {}
        self.matched: dict[Label, list[MatchedAtoms]] = {}
        self.contracted = [x for x in self.la if x in self.lb and x not in self.lo]
        self._layout: Layout | None = None
        self.single: dict[Atom, Label] = {}
        self.widths: dict[str, list[Atom]] = {"a": [], "b": []}
        self.given: Callable[[], str | None] | None = None
        self.log_sums = False
        self.path: str | None = None
        self.dtype: torch.dtype | None = None
        # Asked for by every term, mask and operand of one call, and by all uses of one softmax: made once.
        self._roles: tuple[tuple[Atom, ...], Roles] | None = None

    @property
    def learned(self) -> bool:
        """Whether an operand is a parameter of the model."""
        return isinstance(self.a, nn.Parameter) or isinstance(self.b, nn.Parameter)

    @property
    def of_one(self) -> bool:
        """Whether both operands lie in the same memory, from the same place on: a Gram matrix."""
        return bool(decide(_lie_as_one, self.a, self.b))

    @property
    def untouched(self) -> bool:
        """Whether neither operand was written to since."""
        return self.versions == (version_then(self.a), version_then(self.b))

    def keep(self, storage: int) -> bool:
        """The memory at ``storage`` is about to be written to: copy an operand that lies in it; whether one does."""
        if not self.untouched:
            return False
        before = self.a, self.b
        self.a, self.b = (x.clone() if storage_of(x) == storage else x for x in before)
        self.versions = (version_then(self.a), version_then(self.b))
        return self.a is not before[0] or self.b is not before[1]

    def layout(self, shape: tuple[int, ...], args: object = None) -> Layout:
        """The layout of the result, worked out once; fills :attr:`axes` and :attr:`matched`.

        It has the signature of the functions of :mod:`.axis_history`: the result's origin calls it, if ever.
        """
        if self._layout is not None:
            return self._layout
        layout_a, layout_b = (_valid(o.full(), t) for o, t in ((self.origin_a, self.a), (self.origin_b, self.b)))
        dims_a, dims_b = dict(zip(self.la, layout_a, strict=True)), dict(zip(self.lb, layout_b, strict=True))
        width_a, width_b = ([a for x in self.contracted for a in d[x]] for d in (dims_a, dims_b))
        self.widths = {"a": width_a, "b": width_b}
        heads_a, heads_b = HeadTest(width_a), HeadTest(width_b)
        made = self._made()
        out = []
        for label, extent in zip(self.lo, shape, strict=True):
            atoms = []
            own: Side
            for x, y in _matched(dims_a.get(label, ()), dims_b.get(label, ()), extent):
                # An extent of 1 that is broadcast against more is no axis of that operand.
                if x is None or y is None:
                    source, own = x or y, "a" if y is None else "b"
                    assert source is not None
                    sources: tuple[Atom, ...] = (source,)
                else:
                    sources, own = (x, y), "batch"
                    source = x if x.birth == y.birth and not x.repeated else min(sources, key=_unsure)
                atom = Atom(source.size, of=source)
                if made is not None and (own == made.side or (own == "batch" and atom.birth == "feature")):
                    # A map: the axes that it alone has are new; those that it shares are its own for each head.
                    birth = atom.birth if own == "batch" else made.birth
                    atom = Atom(source.size, birth=birth, maps=made.maps | atom.maps)
                if len(sources) == 2 and atom.role is None:
                    atom.role = x.role or y.role if x is not None and y is not None else None
                if extent == 1:
                    self.single[atom] = label
                    atoms.append(atom)
                    continue
                self.axes[atom] = Axis(own, heads_a(x) or heads_b(y), source, sources)
                self.matched.setdefault(label, []).append(MatchedAtoms(atom, x, y))
                atoms.append(atom)
            if extent_of(atoms) != extent:
                shapes = f"{tuple(self.a.shape)} and {tuple(self.b.shape)}"
                raise LayoutError(f"the axes of a product of {shapes} do not fit")
            out.append(tuple(atoms))
        self._layout = tuple(out)
        return self._layout

    def _made(self) -> _Made | None:
        """What a learned map makes, where one operand is made of parameters alone and the other is not."""
        learned_a, learned_b = self.origin_a.birth == "parameter", self.origin_b.birth == "parameter"
        if learned_a == learned_b:
            return None
        side: Side = "a" if learned_a else "b"
        data = self.origin_b if learned_a else self.origin_a
        labels, layout = (self.lb if learned_a else self.la), data.layout()
        if len(layout) != len(labels):
            return _Made(side, "feature", frozenset((self.map_of(side),)))
        summed = [a for x, d in zip(labels, layout, strict=True) if x in self.contracted for a in d]
        others = [a for x, d in zip(labels, layout, strict=True) if x not in self.contracted for a in d]
        return _Made(side, mapped_birth(summed, others), frozenset((self.map_of(side),)))

    def map_of(self, side: Side) -> object:
        """What tells the learned map on one side from others."""
        return map_of(self.a if side == "a" else self.b)

    def atoms_of(self, label: Label) -> list[Atom]:
        """The atoms of one axis of the result; none where its extent is 1."""
        return [m.out for m in self.matched.get(label, ())]

    def roles(self, softmax_atoms: tuple[Atom, ...], label: Label | None = None) -> Roles:
        """The roles of the axes of the result, given those that are summed with the values.

        Args:
            softmax_atoms: the atoms of the keys.
            label: the keys' axis, where it is known: a single key leaves no atom.
        """
        if self._roles is None or self._roles[0] != softmax_atoms:
            self._roles = softmax_atoms, Roles(self, softmax_atoms, label)
        return self._roles[1]

    def roles_over(self, origin: Origin, dim: int) -> Roles:
        """The same, given the dimension of scores with these axes that the keys lie along."""
        return self.roles(origin.layout()[dim], self.label_of(origin, dim))

    def label_of(self, origin: Origin, dim: int) -> Label | None:
        """The label of a dimension with an extent of 1, of scores with these axes; None: it is not known."""
        atoms = origin.full()[dim]
        return self.single.get(atoms[0]) if len(atoms) == 1 else None

    def operand_factors(self, which: Literal["a", "b"], roles: Roles) -> list[list[Factor]]:
        """The factors of each dimension of an operand of the score product (``D``: those that are summed over).

        Last come heads that the operand does not have, of extent 1: it is the same for each of them.
        """
        labels, tensor = (self.la, self.a) if which == "a" else (self.lb, self.b)
        out, has = [], set[Atom]()
        for label, extent in zip(labels, tensor.shape, strict=True):
            if label in self.contracted:
                out.append([Factor(extent, "D")])
                continue
            factors = []
            for matched in self.matched.get(label, ()):
                own = matched.a if which == "a" else matched.b
                if own is not None:
                    factors.append(roles.factor(matched.out, broadcast=extent == 1, repeated=own.repeated))
                    has.add(matched.out)
            out.append(factors)
        return [*out, [roles.factor(a, broadcast=True) for a in roles.heads if a not in has]]


class AxisRoles:
    """The roles of the axes of weights, by whatever they are told.

    Args:
        atoms: of the weights' axes, the outermost first.
    """

    def __init__(self, atoms: Iterable[Atom]):
        self._places = {atom: place for place, atom in enumerate(atoms)}

    def of(self, atom: Atom) -> str:
        """B, H, T or S."""
        raise NotImplementedError

    def root(self, atom: Atom) -> Atom:
        """The atom of the weights' axes that this one is, or was split from."""
        found = atom.nearest(self._places)
        if found is None:
            raise LayoutError("an axis appeared between the scores and their use")
        return found

    def factor(self, atom: Atom, *, broadcast: bool = False, repeated: bool = False) -> Factor:
        """An atom as a factor of a tensor that is brought into B H T S."""
        return Factor(atom.size, self.of(atom), broadcast, repeated, (self._places[self.root(atom)], -atom.step))

    def factors(self, layout: Layout, shape: Sequence[int] | None = None) -> list[list[Factor]]:
        """The factors of a tensor laid out like the scores, or broadcast against them (``shape``)."""
        shape = sizes(layout) if shape is None else shape
        return [[self.factor(a, broadcast=extent == 1) for a in dim] for dim, extent in zip(layout, shape, strict=True)]

    def head_numbers(self, layout: Layout, device: torch.device) -> Tensor:
        """For every entry of a tensor laid out like the scores: the number of its head, from 0. Any shape that fits."""
        atoms = [a for dim in layout for a in dim]
        heads = sorted((self.factor(a).place, i) for i, a in enumerate(atoms) if self.of(a) == "H")
        steps, step = dict[int, int](), 1
        for _, i in reversed(heads):
            steps[i], step = step, step * atoms[i].size
        number = torch.zeros((), dtype=torch.long, device=device)
        for i, atom in enumerate(atoms):
            number = number[..., None] + torch.arange(atom.size, device=device) * steps.get(i, 0)
        return number.reshape(sizes(layout))


def basis_of(guessed: Container[str]) -> dict[str, str]:
    """For each of B, H, T, S and G how it is known, where axes are followed; ``guessed``: the letters that are not."""
    return {x: "guessed" if x in guessed else "followed" for x in "BHTSG"}


class Roles(AxisRoles):
    """The role of each atom of a score product, given the atoms of the keys.

    What is summed with the values are the keys; the side they are on is ``k``, and the other is ``q``. Of what is left,
    in this order:

    1. what a tap or the user said of an axis;
    2. queries: what is on their side alone, and of one line with the keys (self-attention);
    3. heads: what has its line, or the learned map that made it, in common with the width that q·k sums over. Where
       keys are features and the sum runs over positions (attention across channels), features on the queries' side are
       queries;
    4. by elimination: what is on the queries' side alone are queries, and all else are batch entries.

    The last step holds if the widths of q and k are known to be features, so that heads would have been seen. Where
    they are not, it is convention that names the axes, and they are *guessed*.

    Attributes:
        keys: the side of the keys.
        softmaxed: the atoms of the keys.
        heads: the atoms that are heads.
        guessed: the letters of the axes that are guessed.
        given: the letters that the user named.
        told: whether a tap said of every axis what it is.
    """

    def __init__(self, product: Product, softmax_atoms: Sequence[Atom], label: Label | None = None):
        super().__init__(product.axes)
        self.product = product
        self._known: dict[Atom, str] = {}
        self.softmaxed = {self.root(a) for a in softmax_atoms}
        self.keys = self._side_of_keys(label)
        self.guessed: set[str] = set()
        self.given: set[str] = set()
        self.told = False
        self.heads: set[Atom] = set()
        free = [a for a in product.axes if a not in self.softmaxed]
        named = self._named_by_user(free)
        self._find([a for a in free if a not in named])
        self._order_heads()

    def _side_of_keys(self, label: Label | None) -> Side:
        product = self.product
        sides = {product.axes[a].side for a in self.softmaxed}
        if "batch" in sides or len(sides) > 1:
            raise LayoutError("the softmax runs over an axis that is not the keys' alone")
        if sides:
            return sides.pop()
        if label is not None and (label in product.la) != (label in product.lb):
            return "a" if label in product.la else "b"
        # One single key leaves no atom. It is on the side that has no extent of its own, if one has; else its side is
        # that of the last axis of the product, where keys usually are.
        own = {s: any(x.side == s for x in product.axes.values()) for s in ("a", "b")}
        if own["a"] != own["b"]:
            return "b" if own["a"] else "a"
        last = product.lo[-1]
        return "b" if last in product.lb and last not in product.la else "a"

    def _named_by_user(self, free: Sequence[Atom]) -> set[Atom]:
        """Take over what the user said of the queries' axes."""
        product = self.product
        given = product.given() if product.given is not None else None
        if given is None:
            return set()
        labels = product.la if self.queries == "a" else product.lb
        if len(labels) != len(given):
            raise LayoutError(f"layout= names {len(given)} axes ({given}), and the queries have {len(labels)}")
        named: set[Atom] = set()
        for label, letter in zip(labels, given, strict=True):
            if (label in product.contracted) != (letter == "D"):
                raise LayoutError(f"layout= ({given}) does not have D where the product of queries and keys sums")
            for atom in product.atoms_of(label):
                if atom in free:
                    self._known[atom] = letter
                    named.add(atom)
                    if letter == "H":
                        self.heads.add(atom)
        self.given = set("BHTSG")
        return named

    def _find(self, free: Sequence[Atom]) -> None:
        axes = self.product.axes
        mine = [a for a in free if axes[a].side == self.queries]
        shared = [a for a in free if axes[a].side != self.queries]
        lines = {a.root for a in self.softmaxed} | {s.root for a in self.softmaxed for s in axes[a].sources}
        known_queries = {a for a in mine if a.role is None and any(s.root in lines for s in axes[a].sources)}
        across = self._attends_across_features()
        rest = [a for a in free if a not in known_queries]
        if across:
            self.heads.update(a for a in rest if a.role == "H" or (a in shared and self._feature(a)))
        else:
            self.heads.update(a for a in rest if a.role == "H" or (a.role is None and axes[a].head))
            # What both have, one by copies and one by a parameter, is no batch: nothing that was given lies along it.
            self.heads.update(a for a in shared if a.role is None and self._learned_alone(a))
            if not self.heads:  # the width of each head went through one more map, which all of them share
                self.heads.update(a for a in rest if a.role is None and self._beside_mapped_width(a, known_queries))
            # Features of another line: heads whose width went through one more map, or tokens that were made of
            # features. They are tokens where the heads of their operand are known.
            other = [a for a in rest if a.role is None and a not in self.heads and self._feature(a)]
            unclear = [a for a in other if not self.heads or self._width_lost(axes[a].side)]
            self.heads.update(unclear)
            if unclear:
                self.guessed.update("BHTG")
        if not self.given:
            self._doubts(mine, shared, known_queries)

    def _beside_mapped_width(self, atom: Atom, known_queries: set[Atom]) -> bool:
        """Whether an atom was split from one dimension with what a map then made the width of.

        So are tokens that were made of features. What both operands have is none of these, nor is what lies beside
        queries that are known.
        """
        axis, widths = self.product.axes[atom], self.product.widths
        if axis.side != "batch" and not known_queries:
            return False
        before = [a.through for x in ("a", "b") for a in widths[x] if a.through is not None]
        parents = {p for a in before for p in a.lineage()}
        return any(p in parents for s in axis.sources for p in s.lineage())

    def _learned_alone(self, atom: Atom) -> bool:
        sources = self.product.axes[atom].sources
        learned = [s.birth == "parameter" and not s.repeated for s in sources]
        return any(learned) and all(x or s.repeated for x, s in zip(learned, sources, strict=True))

    def _width_lost(self, side: Side) -> bool:
        widths = self.product.widths
        return any(a.birth == "lost" for x in ("a", "b") if side in (x, "batch") for a in widths[x])

    def _doubts(self, mine: Sequence[Atom], shared: Sequence[Atom], known_queries: set[Atom]) -> None:
        """Say which letters are guessed, and go by convention where nothing tells of heads."""
        self.told = all(a.role is not None for a in (*mine, *shared)) and bool(mine or shared)
        rest_mine = [a for a in mine if a not in self.heads and a not in known_queries and a.role is None]
        rest_shared = [a for a in shared if a not in self.heads and a.role is None]
        if self.told or not (rest_mine or rest_shared):
            return
        if not self.heads and self._learned_queries(rest_mine):
            return
        sure = all(self._operand_known(side) for side in ("a", "b")) and not any(
            self._lost(a) for a in (*rest_mine, *rest_shared)
        )
        if sure and not self.heads and _groups(self._lines(rest_shared, but=mine)) > 1:
            sure = False  # several axes that both have, and none of them was split from a width: heads, perhaps
        if not sure:
            if rest_shared and (not self.heads or any(self._lost(a) for a in rest_shared)):
                self.guessed.update("BHG")
            if len(rest_mine) > 1 or (rest_mine and not self.heads and not rest_shared):
                self.guessed.update("HTG")
            if not self.heads and not any(a.role for a in shared):
                self.heads.update(a for a in self._heads_by_convention() if a not in known_queries)
        # Queries of several lines beside keys without a batch: the outermost may be batch entries as well.
        if not rest_shared and not known_queries and _groups(self._lines(rest_mine)) > 1:
            first = self._labels(rest_mine)[0]
            if all(a not in self.heads for a in first):
                self._known.update(dict.fromkeys(first, "B"))
                self.guessed.update("BT")

    def _learned_queries(self, rest: Sequence[Atom]) -> bool:
        """A parameter that is the queries as it is, beside keys without heads: its axes are heads and queries.

        Which is which nothing tells. By convention heads come first; of one axis alone, it is heads where it lies
        among the batch dimensions of the product.
        """
        width = self.product.widths[self.queries]
        labels = self._labels([a for a in rest if self.product.axes[a].source.birth == "parameter"])
        if not labels or not width or any(a.birth != "parameter" for a in width):
            return False
        first = next(x for x in self.product.lo if labels[0][0] in self.product.atoms_of(x))
        if len(labels) > 1 or isinstance(first, int):
            self.heads.update(labels[0])
        self.guessed.update("HTG")
        return True

    def _lines(self, atoms: Sequence[Atom], but: Sequence[Atom] = ()) -> list[set[Atom]]:
        """For each axis of the result that has some of the atoms: the lines that these are of.

        Those that have a line in common with ``but`` are left out: windows of positions, say, beside positions.
        """
        axes = self.product.axes
        lines = [{s.root for a in label for s in axes[a].sources} for label in self._labels(atoms)]
        others = {s.root for a in but for s in axes[a].sources}
        return [line for line in lines if not line & others]

    def _labels(self, atoms: Sequence[Atom]) -> list[list[Atom]]:
        """Atoms by the axis of the result that they are of."""
        dims = ([a for a in self.product.atoms_of(x) if a in atoms] for x in self.product.lo)
        return [dim for dim in dims if dim]

    def _feature(self, atom: Atom) -> bool:
        return any(s.birth == "feature" for s in self.product.axes[atom].sources)

    def _lost(self, atom: Atom) -> bool:
        return self.product.axes[atom].source.birth == "lost"

    def _attends_across_features(self) -> bool:
        """Whether features attend to features, and the product sums over positions."""
        widths = [a for side in self.product.widths.values() for a in side]
        positions = bool(widths) and all(a.birth == "data" for a in widths)
        return positions and bool(self.softmaxed) and all(self._feature(a) for a in self.softmaxed)

    def _operand_known(self, side: str) -> bool:
        """Whether heads would have been seen in an operand: its width is of features, or heads were seen in it."""
        width, axes = self.product.widths[side], self.product.axes
        if width and all(a.birth in ("feature", "parameter") for a in width):
            return True
        if any(axes[a].side in (side, "batch") for a in self.heads):
            return True
        return self._attends_across_features()

    def _heads_by_convention(self) -> list[Atom]:
        """The heads where no history tells of any."""
        product = self.product
        dims = [x for x in product.lo if x in product.la and x in product.lb]
        if len(dims) > 1:  # the batch dimension next to the matrices; a lone one is the batch
            return product.atoms_of(dims[-1])
        own = [x for x in product.lo if x not in dims and not self._softmaxed(x) and self._side(x) == self.queries]
        # Keys without heads, shared by all: of the queries' own two dimensions the outer one is the heads.
        return product.atoms_of(own[0]) if len(own) == 2 else []

    def _order_heads(self) -> None:
        """Heads that were split from one width are numbered as they lie in it, in whatever order they lie now."""
        mine = [a for a in self.product.axes if a in self.heads]
        if len(mine) < 2:
            return
        sources = {a: self._query_source(a) for a in mine}
        first = sources[mine[0]]
        if all(sources[a].root is first.root and not sources[a].repeated for a in mine):
            inner_last = sorted(mine, key=lambda a: -sources[a].step)
            places = sorted(self._places[a] for a in mine)
            self._places.update(zip(inner_last, places, strict=True))

    def _query_source(self, atom: Atom) -> Atom:
        """The queries' own atom; the keys' where the queries have none."""
        matched = next(m for of in self.product.matched.values() for m in of if m.out is atom)
        q, k = (matched.a, matched.b) if self.queries == "a" else (matched.b, matched.a)
        return q if q is not None else k if k is not None else atom

    def _side(self, label: Label) -> Side:
        return "a" if label in self.product.la else "b"

    def _softmaxed(self, label: Label) -> bool:
        return any(a in self.softmaxed for a in self.product.atoms_of(label))

    @property
    def queries(self) -> Side:
        """The side the queries are on."""
        return "a" if self.keys == "b" else "b"

    @property
    def basis(self) -> dict[str, str]:
        """For each of B, H, T, S and G how it is known."""
        if self.given:
            return dict.fromkeys("BHTSG", "adapter")
        if self.told:
            return dict(KERNEL_BASIS)
        return basis_of(self.guessed)

    def of(self, atom: Atom) -> str:
        """B, H, T or S."""
        role = self._known.get(atom)
        if role is None:
            root = self.root(atom)
            if root in self.softmaxed:
                role = "S"
            elif root in self._known:
                role = self._known[root]
            elif root in self.heads:
                role = "H"
            elif root.role is not None and root.role in "BT":
                role = root.role
            else:
                role = "T" if self.product.axes[root].side == self.queries else "B"
            self._known[atom] = role
        return role


def _lie_as_one(a: Tensor, b: Tensor) -> bool:
    return address_of(a) == address_of(b) and a.numel() == b.numel()


def _groups(lines: Sequence[set[Atom]]) -> int:
    """How many groups of axes there are that have no line in common."""
    groups: list[set[Atom]] = []
    for line in lines:
        joined = set(line)
        for other in [g for g in groups if g & line]:
            groups.remove(other)
            joined |= other
        groups.append(joined)
    return len(groups)


class _Made(NamedTuple):
    """What a learned map makes of its own axes: the side that it is on, their birth, and what tells it from others."""

    side: Side
    birth: Birth
    maps: frozenset[object]


class HeadTest:
    """Whether an atom is heads, by the width that a product sums over."""

    __slots__ = ("parents", "width")

    def __init__(self, width: Sequence[Atom]) -> None:
        self.width = width
        self.parents = {p for a in width for p in a.lineage()}

    def __call__(self, atom: Atom | None) -> bool:
        if atom is None:
            return False
        parent = atom.parent
        while parent is not None:  # split from one dimension, beside the width of a head
            if parent in self.parents:
                return True
            parent = parent.parent
        if atom.birth != "feature":
            return False
        return any(a.birth == "feature" and (a.root is atom.root or a.maps & atom.maps) for a in self.width)


def _unsure(atom: Atom) -> int:
    """How little an atom tells of what it is."""
    return ("feature", "data", "parameter", "lost").index(atom.birth) + (4 if atom.repeated else 0)


def mixes_heads(product: Product, atoms: Sequence[Atom]) -> bool:
    """Whether these axes of a product's result are heads (or batch), all of them: a sum over them mixes heads."""
    axes = product.axes
    found = [x.nearest(axes) for x in atoms]
    return bool(found) and all(a is not None and (axes[a].side == "batch" or axes[a].head) for a in found)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The views that bring tensors of one shape into B H T S, each None where it would change nothing.

    Attributes:
        first: the dimensions in the order in which the factors are.
        split: the extents of the factors, to which the dimensions are split.
        index: leaves out copies.
        expanded: the extents to which what is there only by broadcasting is expanded.
        order: the dimensions in their new order.
        joined: the extents of the result, in which the factors of each role are one dimension.
        parts: how many factors lie together, and whether that is a dimension of the tensor or one that it lacks.
    """

    split: tuple[int, ...] | None
    index: tuple[Any, ...] | None
    expanded: tuple[int, ...] | None
    order: tuple[int, ...] | None
    joined: tuple[int, ...] | None
    first: tuple[int, ...] | None = None
    parts: tuple[tuple[int, bool], ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """A tensor in its roles."""
        if self.first is not None:
            x = x.permute(self.first)
        if self.split is not None:
            x = x.reshape(self.split)
        if self.index is not None:
            x = x[self.index]
        if self.expanded is not None:
            x = x.expand(self.expanded)
        if self.order is not None:
            x = x.permute(self.order)
        return x if self.joined is None else x.reshape(self.joined)

    def back(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse: what is in its roles, as it lies in the model.

        Args:
            x: a tensor in its roles.
            shape: of the tensor that was brought into them. The result's has more where this has an extent of 1 that
                stands for several entries, and these are no longer alike.

        Raises:
            LayoutError: entries differ that are one in the model, in a dimension that its tensor does not have.
        """
        mine = [shape[i] for i in self.first] if self.first is not None else list(shape)
        now = list(mine if self.split is None else self.split)
        kept = list(range(len(now))) if self.index is None else [i for i, k in enumerate(self.index) if k != 0]
        whole = [now[i] for i in kept] if self.expanded is None else list(self.expanded)
        order = range(len(whole)) if self.order is None else self.order
        x = x.reshape([whole[i] for i in order])
        if self.order is not None:
            x = x.permute([self.order.index(i) for i in range(len(whole))])
        for i, place in enumerate(kept):
            if whole[i] != now[place] and _alike(x, i):
                x = x.narrow(i, 0, 1)
        for i in range(len(now)):
            if i not in kept:
                x = x.unsqueeze(i)
        full = [n if i in kept else now[i] for i, n in enumerate(x.shape)]
        x = x.expand(full)
        made, first = list[int](), 0
        for n, there in self.parts:
            extent = math.prod(full[first : first + n])
            first += n
            if there:
                made.append(extent)
            elif extent != 1:
                raise LayoutError("the model has one for all of what was changed for some")
        x = x.reshape(made)
        return x if self.first is None else x.permute([self.first.index(i) for i in range(len(made))])


def _alike(x: Tensor, dim: int) -> bool:
    """Whether the entries along a dimension are the same."""
    return torch.equal(x, x.narrow(dim, 0, 1).expand_as(x))


def arrange(
    x: Tensor, dims: Sequence[Sequence[Factor]], roles: str, *, group: bool = False, broadcast: bool = False
) -> Tensor:
    """Bring a tensor into the given roles, as :func:`arrangement` says."""
    return arrangement(x.shape, dims, roles, group=group, broadcast=broadcast)(x)


def arrangement(
    shape: Sequence[int],
    dims: Sequence[Sequence[Factor]],
    roles: str,
    *,
    group: bool = False,
    broadcast: bool = False,
) -> Arrangement:
    """How a tensor is brought into the given roles, one dimension each.

    Args:
        shape: the tensor's.
        dims: the factors of each of its dimensions.
        roles: the target, for example ``"BHTS"``.
        group: heads that are there only as copies are left out (``k`` and ``v`` of grouped queries).
        broadcast: extents that are there only by broadcasting stay 1 (bias, mask).

    Raises:
        LayoutError: an axis has none of the roles.
    """
    factors = [f for dim in dims for f in dim]
    left_over = next((f.role for f in factors if f.role not in roles), None)
    if left_over is not None:
        raise LayoutError(f"an axis in the role {left_over} is left over")
    now = [1 if f.broadcast else f.size for f in factors]
    split = tuple(now) if list(shape) != now else None
    index = None
    if group:
        keep = _grouped(factors)
        if not all(keep):
            index = tuple(slice(None) if k else 0 for k in keep)
            now = [n for n, k in zip(now, keep, strict=True) if k]
            factors = [f for f, k in zip(factors, keep, strict=True) if k]
    by_role = [[i for i, f in enumerate(factors) if f.role == role] for role in roles]
    for mine in by_role:
        if len(mine) > 1:
            mine.sort(key=lambda i: factors[i].place)
    whole = list(now)
    for mine in by_role:
        if not (broadcast and all(whole[i] == 1 for i in mine)):
            for i in mine:
                whole[i] = factors[i].size
    order = [i for mine in by_role for i in mine]
    extents = [math.prod(whole[i] for i in mine) for mine in by_role]
    return Arrangement(
        split,
        index,
        tuple(whole) if whole != now else None,
        tuple(order) if order != sorted(order) else None,
        tuple(extents) if [whole[i] for i in order] != extents else None,
        parts=tuple((len(dim), i < len(shape)) for i, dim in enumerate(dims)),
    )


def _grouped(factors: Sequence[Factor]) -> list[bool]:
    """Which factors stay: of the heads, the trailing run of copies goes.

    Only a trailing one: query head h reads key head h // n, as the contract has it, where the copies are innermost.
    """
    keep = [True] * len(factors)
    heads = [i for i, f in enumerate(factors) if f.role == "H"]
    if len(heads) > 1:
        heads.sort(key=lambda i: factors[i].place)
    for i in reversed(heads):
        if not (factors[i].broadcast or factors[i].repeated):
            break
        keep[i] = False
    return keep


def _matched(a: Sequence[Atom], b: Sequence[Atom], extent: int) -> list[tuple[Atom | None, Atom | None]]:
    """The atoms of one axis that come from either operand, side by side; of both where both have it."""
    if extent == 1:
        # A dimension that was put in for the other operand's is no axis.
        x, y = (next((z for z in atoms if not z.repeated), None) for atoms in (a, b))
        return [(x, None)] if x is not None else [(None, y)] if y is not None else [(Atom(1, birth="lost"), None)]
    a, b = ([x for x in atoms if x.size != 1] for atoms in (a, b))
    if a and b:
        # Factorings that do not fit each other: those of the first count.
        return list(refine(a, b) or ((x, None) for x in a))
    return [(x, None) for x in a] + [(None, y) for y in b]


def _valid(layout: Layout, x: Tensor) -> Layout:
    return layout if len(layout) == x.dim() else fresh(x.shape)
