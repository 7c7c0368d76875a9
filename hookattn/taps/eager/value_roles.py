"""Which axis is which where no product of queries and keys tells: by weights and the values that they meet."""

from __future__ import annotations

from .axis_history import Atom, refine
from .products import AxisRoles, LayoutError, basis_of
from .states import ValueProduct


class ValueRoles(AxisRoles):
    """The roles of the axes of weights, given their product with values.

    What is summed with the values are the keys. What the weights alone have are queries, or heads of theirs: heads
    where it was split from features, and others of them are positions. What weights and values share is heads where it
    was split from features of the values, and batch entries else.

    Attributes:
        keys: the atoms of the keys.
        basis: for each of B, H, T, S and G how it is known.
    """

    def __init__(self, use: ValueProduct):
        layout = use.weights_origin.layout()
        if len(layout) != len(use.weights_labels):
            raise LayoutError("the axes of the weights are not known")
        dims = dict(zip(use.weights_labels, layout, strict=True))
        of_v = use.v_origin.layout()
        vectors = dict(
            zip(use.v_labels, of_v if len(of_v) == len(use.v_labels) else ((),) * len(use.v_labels), strict=True)
        )
        extents = dict(zip(use.v_labels, use.v.shape, strict=True))
        self._roles: dict[Atom, str] = {}
        super().__init__(atom for atoms in dims.values() for atom in atoms)
        guessed: set[str] = set()
        own: list[Atom] = []
        shared: list[tuple[Atom, tuple[Atom, ...]]] = []
        keys: list[Atom] = []
        values: list[Atom] = []
        for label, atoms in dims.items():
            if label in use.v_labels and label not in use.out_labels:
                keys += atoms
                values += vectors[label]
            elif label in vectors and extents[label] > 1:
                pairs = refine(atoms, vectors[label]) or [(a, a) for a in atoms]
                for a in atoms:
                    shared.append((a, tuple(y for x, y in pairs if x is a or a in x.lineage())))
            else:
                own += atoms
        self.keys, self.values = keys, values
        self.own = own
        self._roles.update(dict.fromkeys(keys, "S"))
        lines = {a.root for a in (*keys, *values)}
        positions = [a for a in own if a.role in (None, "T") and (a.birth == "data" or a.root in lines)]
        for atom in own:
            head = atom.role == "H" or (atom.role is None and atom.birth == "feature" and bool(positions))
            self._roles[atom] = atom.role if atom.role in ("B", "T") else "H" if head else "T"
            if atom.birth == "lost" and atom.role is None:
                guessed.update("HT")
        for atom, others in shared:
            sources = [s for s in (atom, *others) if not s.repeated] or [atom, *others]
            if all(s.repeated for s in sources):
                guessed.update("BHG")
            role = next((s.role for s in sources if s.role in ("B", "H", "T")), None)
            if role is None:
                role = "H" if any(s.birth == "feature" for s in sources) else "B"
                if any(s.birth == "lost" for s in sources):
                    guessed.update("BHG")
            self._roles[atom] = role
        if len(shared) > 1 and "H" not in self._roles.values() and guessed:
            self._roles[shared[-1][0]] = "H"
        if any(a.birth == "lost" for a in keys):
            guessed.add("S")
        self.basis = basis_of(guessed)

    def of(self, atom: Atom) -> str:
        """B, H, T or S."""
        return self._roles[self.root(atom)]
