"""Axes of one run of a model's operations, as they were in another run of the same.

A recipe knows where the axes of its tensors come from as they were when it was learned. In a later run they come from
other tensors in the same way. A :class:`Correspondence` says which axis is which: it pairs the axes of what the run is
given with those that the recipe was given, and refuses where the two are not alike; of all others it makes a picture
when somebody asks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from .axis_history import Atom, Birth, Cut, Layout, Origin, broadcast, keep_dims

# What is asked of an origin beside its layout: whether it has just been indexed, or is a sum of several.
_TOLD = (keep_dims, broadcast)


def frozen(origin: Origin, known: dict[int, tuple[Origin, Origin]]) -> Origin:
    """An origin that keeps no tensor alive, with its layout worked out.

    Args:
        origin: the origin.
        known: those that were made before, with what they are of, by the identity of that.

    Raises:
        LayoutError: its axes can't be worked out.
    """
    made = known.get(id(origin))
    if made is not None:
        return made[1]
    if type(origin) is Origin and origin.how is None and origin.parent is None and origin.cut is None:
        origin.full()
        known[id(origin)] = origin, origin
        return origin
    copy = Origin(origin.shape, birth=origin.birth)
    known[id(origin)] = origin, copy
    copy._layout = origin.full()
    copy.how = origin.how if origin.how in _TOLD else None
    if origin.cut is not None:
        copy.cut = origin.cut._replace(source=frozen(origin.cut.source, known))
    if origin._entry_of is not None:
        copy._entry_of = frozen(origin._entry_of[0], known), origin._entry_of[1]
    return copy


def maps_in(origins: Iterable[Origin]) -> set[Any]:
    """What tells the learned maps from others that made the axes of some tensors, or axes that these come from."""
    found: set[Any] = set()
    seen: set[Atom] = set()
    waiting: list[Atom | None] = [a for origin in origins for dim in origin.full() for a in dim]
    while waiting:
        atom = waiting.pop()
        if atom is None or atom in seen:
            continue
        seen.add(atom)
        found |= atom.maps
        waiting += [atom.parent, atom._root, atom.through, *atom.beside]
    return found


class Context:
    """Which axes of a recipe are which of another, of all that a run of the one is given by a run of the other.

    It is the same in every pair of such runs, so that it is worked out once. Immutable; :meth:`grown` gives the next.

    Attributes:
        pairs: what is paired.
    """

    __slots__ = ("_grown", "pairs")

    def __init__(self, pairs: Correspondence) -> None:
        self.pairs = pairs
        self._grown: dict[tuple[int, int], tuple[Origin, Origin, Context | None]] = {}

    def grown(self, learned: Origin, given: Origin) -> Context | None:
        """With one more pair; None: they are not alike, or not as they lie to what was paired before."""
        found = self._grown.get((id(learned), id(given)))
        if found is None:
            pairs = self.pairs.copy()
            found = learned, given, Context(pairs) if pairs.pair(learned, given) else None
            self._grown[id(learned), id(given)] = found
        return found[2]


# A run knows the run before it, which knows the one before that. So many are known; the next is worked out by itself.
_LONGEST = 24


class Correspondence:
    """Which axis of a run is which of the recipe's.

    Args:
        before: of the run before it, which may have made what this one is given.
        context: nothing paired.
        turned: whether it was made by :meth:`turned`.
    """

    __slots__ = (
        "_atoms",
        "_before",
        "_context",
        "_given",
        "_maps",
        "_maps_taken",
        "_marks",
        "_origins",
        "_pictures",
        "_taken",
        "_turned",
        "depth",
    )

    def __init__(
        self, before: Correspondence | None = None, context: Context | None = None, turned: bool = False
    ) -> None:
        self._turned = turned
        # While all that is given is of the run before, the context says what is what and nothing else is paired.
        self._before = before if before is not None and before.depth < _LONGEST else None
        self._context = context
        self.depth: int = 0 if self._before is None else self._before.depth + 1
        self._given: dict[int, tuple[Origin, Origin]] = {}  # by the identity of the run's, with the recipe's
        self._atoms: dict[Atom, Atom] = {}
        self._taken: dict[Atom, Atom] = {}  # the other way round
        self._maps: dict[Any, Any] = {}
        self._maps_taken: dict[Any, Any] = {}
        self._marks: dict[int, tuple[object, object]] = {}
        self._origins: dict[int, tuple[Origin, Origin]] = {}
        # Weakly: a picture knows whose it is, and of what it is.
        self._pictures: dict[int, weakref.ref[Picture]] = {}

    def copy(self) -> Correspondence:
        """As it is now: what is paired since can be let go of."""
        other = Correspondence(self._before, self._context, self._turned)
        other._given = dict(self._given)
        other._atoms, other._taken = dict(self._atoms), dict(self._taken)
        other._maps, other._maps_taken = dict(self._maps), dict(self._maps_taken)
        other._origins, other._marks = dict(self._origins), dict(self._marks)
        return other

    def turned(self) -> Correspondence:
        """The other way round: which axis of the recipe is which of the run. What only the run has stays what it is."""
        self._settle()
        other = Correspondence(turned=True)
        other._atoms, other._taken = dict(self._taken), dict(self._atoms)
        other._maps, other._maps_taken = dict(self._maps_taken), dict(self._maps)
        other._marks = {id(here): (here, learned) for learned, here in self._marks.values()}
        other._origins = {id(here): (here, learned) for learned, here in self._origins.values()}
        return other

    # What a run is given

    def meets(self, learned: Origin, here: Origin) -> bool:
        """As :meth:`pair`, of something that a run is given."""
        before = self._before
        if before is not None and self._context is not None:
            given = before._learned_of(here)
            known = self._given.get(id(here))
            if known is not None:
                return known[1] is learned
            if given is not None:
                context = self._context.grown(learned, given)
                if context is None:
                    return False
                self._context = context
                self._given[id(here)] = here, learned
                self._origins[id(learned)] = learned, here
                return True
            if not self._settle():
                return False
        self._given[id(here)] = here, learned
        return self.pair(learned, here)

    def _learned_of(self, here: Origin) -> Origin | None:
        """The recipe's origin that one of the run is, if it was made by the run or given to it."""
        if type(here) is Picture and here._by is self:
            return here._learned
        given = self._given.get(id(here))
        return None if given is None else given[1]

    def _settle(self) -> bool:
        """Pair all that was given by itself, and not by what the run before was given."""
        before, context = self._before, self._context
        if before is None or context is None:
            return True
        self._before, self.depth = None, 0
        self._origins.clear()
        return all(self.pair(learned, before.origin(given)) for learned, given in list(context.pairs._origins.values()))

    def pair(self, learned: Origin, here: Origin) -> bool:
        """Take two origins for the same; False where they are not alike, or not as they lie to what was paired before.

        After a False some axes may be paired: the run can't go on as the recipe's.
        """
        known = self._origins.get(id(learned))
        if known is not None:
            return known[1] is here
        if learned.shape != here.shape or learned.birth != here.birth:
            return False
        if learned.how is not here.how and (learned.how in _TOLD or here.how in _TOLD):
            return False
        self._origins[id(learned)] = learned, here
        one, other = learned.full(), here.full()
        for mine, theirs in zip(one, other, strict=True):
            if len(mine) != len(theirs) or not all(map(self._pair_atoms, mine, theirs)):
                return False
        return self._pair_cuts(learned.cut, here.cut) and self._pair_entries(learned._entry_of, here._entry_of)

    def _pair_cuts(self, one: Cut | None, other: Cut | None) -> bool:
        if one is None or other is None:
            return one is other
        same = one[1:-1] == other[1:-1] and self.pair_marks(one.mark, other.mark)
        return same and self.pair(one.source, other.source)

    def pair_marks(self, learned: object, here: object) -> bool:
        """As :meth:`pair`, of what tells tensors that pieces are cut off from others."""
        return self.mark(learned, here) is here

    def _pair_entries(self, one: tuple[Origin, int] | None, other: tuple[Origin, int] | None) -> bool:
        if one is None or other is None:
            return one is other
        return one[1] == other[1] and self.pair(one[0], other[0])

    def _pair_atoms(self, a: Atom | None, b: Atom | None) -> bool:
        if a is None or b is None:
            return a is b
        known = self._atoms.get(a)
        if known is not None:
            return known is b
        if b in self._taken or a.size != b.size or a.birth != b.birth or a.step != b.step:
            return False
        if a.role != b.role or a.repeated != b.repeated:
            return False
        self._atoms[a], self._taken[b] = b, a
        if not (a.maps is b.maps or self._pair_maps(a.maps, b.maps)):
            return False
        return (
            self._pair_atoms(a.parent, b.parent)
            and self._pair_atoms(a._root, b._root)
            and self._pair_atoms(a.through, b.through)
            and (a.beside is b.beside or self._pair_beside(a.beside, b.beside))
        )

    def _pair_beside(self, one: frozenset[Atom], other: frozenset[Atom]) -> bool:
        left = [a for a in one if a not in self._atoms]
        taken = {self._atoms[a] for a in one if a in self._atoms}
        right = [b for b in other if b not in taken]
        # Of several nothing tells which is which.
        return taken <= other and len(left) == len(right) < 2 and all(map(self._pair_atoms, left, right))

    def _pair_maps(self, one: frozenset[Any], other: frozenset[Any]) -> bool:
        for m in one & other:  # the same layer as then
            if m not in self._maps and m not in self._maps_taken:
                self._maps[m] = self._maps_taken[m] = m
        left = [m for m in one if m not in self._maps]
        taken = {self._maps[m] for m in one if m in self._maps}
        right = [m for m in other if m not in taken]
        if not taken <= other or len(left) != len(right) or len(left) > 1:  # of several nothing tells which is which
            return False
        for a, b in zip(left, right, strict=True):
            if b in self._maps_taken:
                return False
            self._maps[a], self._maps_taken[b] = b, a
        return True

    def apply(self, learned: Any, here: Any) -> None:
        """The run applied a learned map where the recipe applied another; what tells each from others."""
        self._maps.setdefault(learned, here)

    # What a run makes

    def origin(self, learned: Origin) -> Origin:
        """The run's origin that is the recipe's ``learned``."""
        known = self._origins.get(id(learned))
        if known is not None:
            return known[1]
        picture = self._pictures.get(id(learned))
        made = None if picture is None else picture()
        if made is None:
            made = Picture(learned, self)
            self._pictures[id(learned)] = weakref.ref(made)
        return made

    def mark(self, learned: object, here: object | None = None) -> object:
        """What tells a tensor of the run from others that was cut as one of the recipe was; ``here``: if it is new."""
        known = self._marks.get(id(learned))
        if known is None:
            if here is None and self._before is not None and self._context is not None:
                given = self._context.pairs._marks.get(id(learned))
                here = None if given is None else self._before.mark(given[1])
            known = self._marks[id(learned)] = learned, object() if here is None else here
        return known[1]

    def layout(self, learned: Layout) -> Layout:
        """The axes of the run that are those of the recipe."""
        return tuple([tuple([self.atom(a) for a in dim]) for dim in learned])

    def atom(self, learned: Atom) -> Atom:
        """The axis of the run that is the recipe's ``learned``."""
        found = self._atoms.get(learned)
        if found is not None:
            return found
        if self._before is not None and self._context is not None:
            given = self._context.pairs._atoms.get(learned)
            if given is not None:
                found = self._atoms[learned] = self._before.atom(given)
                return found
        made = Atom.__new__(Atom)
        self._atoms[learned] = made
        made.size, made.role, made.repeated = learned.size, learned.role, learned.repeated
        made.birth, made.step = learned.birth, learned.step
        made.parent = None if learned.parent is None else self.atom(learned.parent)
        made.through = None if learned.through is None else self.atom(learned.through)
        made._root = None if learned._root is None else self.atom(learned._root)
        made.maps = frozenset([self._map(m) for m in learned.maps]) if learned.maps else learned.maps
        made.beside = frozenset([self.atom(a) for a in learned.beside]) if learned.beside else learned.beside
        return made

    def _map(self, learned: Any) -> Any:
        here = self._maps.get(learned)
        if here is not None:
            return here
        if self._before is not None and self._context is not None:
            given = self._context.pairs._maps.get(learned)
            if given is not None:
                return self._before._map(given)
        return learned if self._turned else (id(self), learned)  # of something that is not there any more


def sight_by(by: Correspondence, seen: Any) -> Any:
    """What was seen of where tensors lie (:func:`.decisions.see`), with the run's marks in place of the recipe's."""
    return (*seen[:-1], by.mark(seen[-1])) if isinstance(seen, tuple) else seen


class Picture(Origin):
    """The origin of a tensor of a run, as a recipe has it; worked out when it is asked for.

    Args:
        learned: the recipe's.
        by: which axis is which.
    """

    __slots__ = ("__weakref__", "_by", "_learned")

    def __init__(self, learned: Origin, by: Correspondence):
        self._learned, self._by = learned, by
        self.shape, self.how, self.depth = learned.shape, learned.how, 0
        self.birth: Birth = learned.birth
        self.parent = self.args = self._layout = self._shown = None

    def full(self) -> Layout:
        """As of any origin."""
        if self._layout is None:
            self._layout = self._by.layout(self._learned.full())
        return self._layout

    @property
    def cut(self) -> Cut | None:  # type: ignore[override]
        """What it was cut off."""
        cut = self._learned.cut
        return None if cut is None else cut._replace(source=self._by.origin(cut.source), mark=self._by.mark(cut.mark))

    @property
    def _entry_of(self) -> tuple[Origin, int] | None:  # type: ignore[override]
        of = self._learned._entry_of
        return None if of is None else (self._by.origin(of[0]), of[1])
