"""One call of the calls of several ranks, or of several batches, along one axis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

from torch import Size, Tensor

from ..attention.kernel_call import FIELD_SPECS, FIELDS, TENSOR_SPECS, FieldSpec
from ..calls.call import Call, joint_basis
from ..calls.certificate import Certificate, joined
from ..calls.edits import AppliedEdit, numbered_together
from ..calls.extents import extents_of, key_heads
from ..calls.fields import DERIVED, Derived, Field, InFile
from ..calls.mask_rule import MaskRule
from ..calls.output_gradient import OutputGradient
from ..errors import MergeError
from ..statistics.received import Received
from ..statistics.registry import spec_of
from .common import same, same_numbers
from .joined_field import NAME, JoinedField, JoinedGradient, JoinedHistories, Piece, Source

WORDS = {"H": "heads", "T": "queries", "B": "batch entries"}
"""What is along an axis, in a word."""

_ALIKE = (
    *("tap", "dtype", "softcap", "window", "dropout", "score", "normalizer", "mixed", "entry", "keys"),
    "attached",
)
ONE_RUN = "These are of different runs: merge the files that one run has written."


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank has of a call.

    Attributes:
        call: its call.
        label: the rank, as messages name it.
        numbers: which positions of the axis in the whole these are.
        full: those that the rank has, selected or not.
        groups: of heads, the key head in the whole that each key head of the call is; None: it kept none.
    """

    call: Call
    label: str
    numbers: Sequence[int]
    full: range
    groups: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Whole:
    """What the parts make.

    Attributes:
        axis: ``"H"``, ``"T"`` or ``"B"``.
        of: how many the whole model has along the axis.
        groups_of: of heads, how many key heads it has; None: that is not known, and no key was kept.
        selected: whether some of the axis were left out by whoever traced.
        advice: what to do where they are not of one call.
    """

    axis: str
    of: int
    groups_of: int | None
    selected: bool
    advice: str = ONE_RUN


def join(parts: Sequence[Part], whole: Whole, histories: JoinedHistories) -> Call:
    """The call that parts make, in their order. Nothing in a file is read but what the headers say, where the ranks
    have written the same.

    Raises:
        MergeError: they are not of one call.
    """
    return _Joint(parts, whole, histories).call()


class _Joint:
    """See :func:`join`."""

    def __init__(self, parts: Sequence[Part], whole: Whole, histories: JoinedHistories):
        self.parts, self.whole, self.histories = parts, whole, histories
        self.calls = [part.call for part in parts]
        self.first = parts[0].call
        self.axis = whole.axis
        self.where = f"{self.first.site.label} (step {self.first.step})"
        self.needed = sorted({g for part in parts for g in part.groups or ()})

    def call(self) -> Call:
        self._check()
        held = self._names()
        made = replace(
            self.first,
            scale=self._scale(),
            causal=any(c.causal for c in self.calls),
            basis=joint_basis(self.calls),
            own_scores=any(c.own_scores for c in self.calls),
            own_by_edits=self._own_by_edits(),
            derivable=tuple(n for n in self.first.derivable if all(n in c.derivable for c in self.calls)),
            shards=self.first.shards[1:],
            requests=self._requests(),
            lengths=self._lengths(),
            notes=(*dict.fromkeys(n for c in self.calls for n in c.notes), self._note()),
            certificate=self._certificate(),
            edits=self._edits(),
            fields={},
            beside={},
            **self._numbers(),
        )
        made.fields = {name: self._field(name) for name in held}
        beside = [n for n in self.first.beside if all(n in c.beside for c in self.calls)]
        made.beside = {name: self._field(name, "beside") for name in beside}
        made.gradient = self._gradient()
        return made

    # What has to agree

    def _check(self) -> None:
        for name in _ALIKE:
            self._agree(name.replace("_", " "), attrgetter(name))
        if self.axis != "T":
            self._agree("whether its kernel hides later keys", lambda c: c.causal)
            self._agree("the query rows that were kept", lambda c: (c.queries, c.of_queries))
        if self.axis != "H":
            self._agree("the heads that were kept", lambda c: (c.heads, c.kv_heads))
        if not any(c.edits for c in self.calls):
            self._agree("whether its scores are the model's own", lambda c: c.own_scores)
        for what in ("layer", "stack", "kind"):
            self._agree(f"the {what}", attrgetter(f"site.{what}"))
        self._agree("whether gradients were kept", lambda c: c.gradient is not None)

    def _agree(self, what: str, of: Callable[[Call], object]) -> None:
        values = [of(call) for call in self.calls]
        self._differ(what, [value == values[0] for value in values], values)

    def _differ(self, what: str, alike: Sequence[bool], values: Sequence[object]) -> None:
        if not all(alike):
            i = list(alike).index(False)
            raise MergeError(
                f"{self.where}: {what} is {values[0]} in {self.parts[0].label} and {values[i]} in "
                f"{self.parts[i].label}. {self.whole.advice}"
            )

    def _names(self) -> list[str]:
        """The fields of the whole. What one rank has stored and another can derive is there."""
        held = dict.fromkeys(name for call in self.calls for name in call.fields)
        for part in self.parts:
            lacking = [n for n in held if n not in part.call.fields and n not in part.call.derivable]
            if lacking:
                other = next(p.label for p in self.parts if lacking[0] in p.call.fields)
                raise MergeError(
                    f"{self.where}: {lacking[0]} is in {other}, and was not captured in {part.label}. Trace all ranks "
                    "with the same capture=."
                )
        return [n for n in FIELDS if n in held] + [n for n in held if n not in FIELDS]

    # What is said of the whole

    def _numbers(self) -> dict[str, Any]:
        found = tuple(n for part in self.parts for n in part.numbers)
        every = not self.whole.selected
        if self.axis == "T":
            return {"queries": None if every else found, "of_queries": None if every else self.whole.of}
        if self.axis == "B":
            return {}
        return {"heads": None if every else found, "kv_heads": self._kv_heads()}

    def _kv_heads(self) -> tuple[int, ...] | None:
        reads: list[int] = []
        for part in self.parts:
            if part.groups is None:
                return None
            h, place = len(part.numbers), [self.needed.index(g) for g in part.groups]
            reads += [place[i] for i in key_heads(part.call, h, len(part.groups))]
        h, g = len(reads), len(self.needed)
        even = g > 0 and h % g == 0 and reads == [i // (h // g) for i in range(h)]
        return None if even else tuple(reads)

    def _requests(self) -> tuple[str, ...] | None:
        if self.axis != "B":
            self._agree("whose requests its batch entries are", lambda c: c.requests)
            return self.first.requests
        if any(c.requests is None for c in self.calls):
            self._agree("whether its requests are known", lambda c: c.requests is None)
            return None
        return tuple(r for c in self.calls for r in c.requests or ())

    def _lengths(self) -> tuple[tuple[int, int], ...] | None:
        if self.axis != "B":
            return self.first.lengths
        several = [c.lengths for c in self.calls]
        return None if None in several else tuple(n for lengths in several for n in lengths or ())

    def _own_by_edits(self) -> bool:
        own = [c for c in self.calls if c.own_scores]
        return bool(own) and all(c.own_by_edits for c in own)

    def _note(self) -> str:
        spans = ", ".join(
            f"{p.full[0]}–{p.full[-1]}" if len(p.full) > 1 else f"{p.full[0]}" for p in self.parts if p.full
        )
        return (
            f"put together of {len(self.parts)} parts of its {WORDS[self.axis]} ({spans}); its certificate is the "
            "worst of theirs"
        )

    def _certificate(self) -> Certificate:
        found = [c.certificate for c in self.calls]
        made = joined(found)
        basis = " and ".join(dict.fromkeys(c.basis for c in found))
        if self.axis == "T":
            return replace(made, basis=basis)
        # All heads and entries of a row are checked where the least of the parts has checked it.
        rows, of_rows = min(c.rows for c in found), max(c.of_rows for c in found)
        return replace(made, basis=basis, rows=rows, of_rows=of_rows)

    def _edits(self) -> tuple[AppliedEdit, ...]:
        if not any(c.edits for c in self.calls):
            return ()
        name = {"H": "heads", "T": "queries", "B": "batch"}[self.axis]
        letters = "HG" if self.axis == "H" else self.axis
        several = []
        for part in self.parts:
            start = part.full.start if self.axis == "B" else 0
            several.append((part.call.edits, partial(self._all_of, part), start))

        def of(edit: AppliedEdit) -> int | None:
            return self.whole.groups_of if "G" in FIELD_SPECS[edit.field].axes and self.axis == "H" else self.whole.of

        return numbered_together(name, letters, several, of)

    def _all_of(self, part: Part, edit: AppliedEdit) -> Iterable[int]:
        """The numbers along the axis of all that a rank has of a field."""
        if self.axis != "H" or "G" not in FIELD_SPECS[edit.field].axes:
            return part.full
        if part.groups is not None and not self.whole.selected:
            return part.groups
        if not self.whole.groups_of:
            return ()
        return {h * self.whole.groups_of // self.whole.of for h in part.full}

    def _gradient(self) -> OutputGradient | None:
        gradients = [c.gradient for c in self.calls if c.gradient is not None]
        if not gradients:
            return None
        there = [g.there is not None for g in gradients]
        self._differ("whether a gradient of its output has come", [t == there[0] for t in there], there)
        why = next((g.why_none for g in gradients if g.why_none), "")
        dim = {"B": 0, "H": 1, "T": 2}[self.axis]
        return JoinedGradient(why_none=why, passes=gradients[0].passes, calls=self.calls, dim=dim)

    def _scale(self) -> float | Tensor | None:
        values = [c.scale for c in self.calls]
        if not any(isinstance(x, Tensor) for x in values):
            self._agree("the scale", lambda c: c.scale)
            return self.first.scale
        if not all(isinstance(x, Tensor) for x in values):
            self._differ("the scale", [isinstance(x, Tensor) == isinstance(values[0], Tensor) for x in values], values)
        sources = [Source.at(c, "scale", c.scale) for c in self.calls if isinstance(c.scale, Tensor)]
        place = self._broadcast(TENSOR_SPECS["scale"], sources)
        return place() if isinstance(place, InFile) else place  # type: ignore[return-value]

    # The fields

    def _field(self, name: str, held: str = "fields") -> Field:
        places = [getattr(c, held).get(name, DERIVED) for c in self.calls]
        if all(place is None for place in places):
            return None
        if all(isinstance(place, Derived) for place in places) and self._follows(name):
            return DERIVED
        sources = [Source.of(c, name, held) for c in self.calls]
        spec = FIELD_SPECS.get(name) or spec_of(name) or FieldSpec(name, "BHT*")
        if any(place is None for place in places):
            sources = self._filled(name, sources, held)
        first = next(s for s in sources if s.place is not None)
        alike = [s.place is None or s.dtype == first.dtype for s in sources]
        self._differ(f"the dtype of {name}", alike, [s.dtype for s in sources])
        if spec.is_column and all(s.own_axes == 1 for s in sources):  # a number for each head
            sources = [s.by_head() for s in sources]
            if self.axis == "H":
                return self._appended(name, 0, sources)
            self._check_copies(name, list(zip(self.parts, sources, strict=True)))
            return sources[0].place
        if spec.per_key_head and self.axis != "B":
            return self._of_key_heads(name, sources)
        if spec.broadcast:
            return self._broadcast(spec, sources)
        if name.partition("(")[0] == Received.name and self.axis == "T":
            self._same_shape(name, sources, None)
            return InFile(JoinedField([Piece(s, 0, 0) for s in sources], None, sources[0].shape), NAME)
        return self._appended(name, {"B": 0, "H": 1, "T": 2}[self.axis], sources)

    def _follows(self, name: str) -> bool:
        """Whether what every rank derives follows from the fields of the whole in the same way."""
        return not any(c.edits or c.own_scores for c in self.calls) and name in FIELD_SPECS

    def _filled(self, name: str, sources: Sequence[Source], held: str) -> list[Source]:
        """What stands for a field of a rank that has none, where another has it: an edit of its heads alone made it.

        Raises:
            MergeError: there is nothing that could.
        """
        if name == "applied":  # the weights met the values
            return [Source.of(s.call, "weights") if s.place is None else s for s in sources]
        if name == "bias":
            return list(sources)  # zeros
        i = [s.place is None for s in sources].index(True)
        j = [s.place is None for s in sources].index(False)
        raise MergeError(
            f"{self.where}: there is no {name} in {self.parts[i].label}, and there is in {self.parts[j].label}. "
            f"{self.whole.advice}"
        )

    def _same_shape(self, name: str, sources: Sequence[Source], dim: int | None) -> None:
        """That the sources differ along no other axis than the one that is put together."""
        shapes = [[n for d, n in enumerate(s.shape) if d != dim] for s in sources]
        self._differ(f"the shape of {name}", [shape == shapes[0] for shape in shapes], [list(s.shape) for s in sources])

    def _appended(self, name: str, dim: int, sources: Sequence[Source]) -> Field:
        self._same_shape(name, sources, dim)
        for part, source in zip(self.parts, sources, strict=True):
            if source.shape[dim] != len(part.numbers):
                raise MergeError(
                    f"{self.where}: {name} is {list(source.shape)} in {part.label}, which has {len(part.numbers)} "
                    f"{WORDS[self.axis]}. Trace it again."
                )
        return self._joined(dim, [Piece(s, 0, s.shape[dim]) for s in sources])

    def _joined(self, dim: int, pieces: Sequence[Piece], others: Sequence[int] | None = None) -> Field:
        """Pieces one behind the other; a piece that is the whole of a field is that field."""
        first = pieces[0].source
        shape = list(others or first.shape)
        shape[dim] = sum(piece.count for piece in pieces)
        if len(pieces) == 1 and first.shape == Size(shape):
            return first.place
        return InFile(JoinedField(pieces, dim, Size(shape)), NAME)

    def _of_key_heads(self, name: str, sources: Sequence[Source]) -> Field:
        """Keys or values: each key head once, or, where every rank has those of all queries, those of the first."""
        if self.axis == "T":
            self._check_copies(name, list(zip(self.parts, sources, strict=True)))
            return sources[0].place
        self._same_shape(name, sources, 1)
        owners: dict[int, tuple[Part, Source, int]] = {}
        compared: set[tuple[int, int]] = set()
        for part, source in zip(self.parts, sources, strict=True):
            assert part.groups is not None
            for at, group in enumerate(part.groups):
                owner, held, there = owners.setdefault(group, (part, source, at))
                if owner is not part and (id(owner), id(part)) not in compared:
                    compared.add((id(owner), id(part)))
                    self._check_copy(name, group, (owner, held, there), (part, source, at))
        pieces: list[Piece] = []
        for group in self.needed:
            _, source, at = owners[group]
            last = pieces[-1] if pieces else None
            if last is not None and last.source is source and last.first + last.count == at:
                pieces[-1] = Piece(source, last.first, last.count + 1)
            else:
                pieces.append(Piece(source, at, 1))
        if len(pieces) > 1 and (history := self.histories.take(pieces)) is not None:
            return history
        return self._joined(1, pieces)

    def _check_copy(
        self, name: str, group: int, one: tuple[Part, Source, int], other: tuple[Part, Source, int]
    ) -> None:
        """That two ranks have the same key head.

        Raises:
            MergeError: they have not.
        """
        (a, first, i), (b, second, j) = one, other
        assert first.place is not None and not isinstance(first.place, Derived)
        assert second.place is not None and not isinstance(second.place, Derived)
        if first.shape == second.shape and i == j and first.shape[1] == 1 and same(first.place, second.place):
            return
        heads = [s.read([slice(None), slice(at, at + 1)] + [slice(None)] * 2) for s, at in ((first, i), (second, j))]
        if not same_numbers(heads[0], heads[1]):
            raise MergeError(
                f"{self.where}: key head {group} is in {a.label} and in {b.label}, and its {name} differ. "
                f"{self.whole.advice}"
            )

    def _check_copies(self, name: str, found: Sequence[tuple[Part, Source]]) -> None:
        """That all ranks have the same of what all queries have in common.

        Raises:
            MergeError: they have not.
        """
        self._same_shape(name, [source for _, source in found], None)
        part, first = found[0]
        for other, source in found[1:]:
            if not _same(first, source):
                raise MergeError(
                    f"{self.where}: {name} is of all queries, and differs between {part.label} and {other.label}. "
                    f"{self.whole.advice}"
                )

    def _broadcast(self, spec: FieldSpec, sources: Sequence[Source]) -> Field:
        """What may have one value for all positions of an axis: as few values as say it."""
        dim = {"B": 0, "H": 1, "T": 2}[self.axis]
        name = spec.name
        there = [(p, s) for p, s in zip(self.parts, sources, strict=True) if s.place is not None]
        for (part, source), d in ((x, d) for x in there for d in range(4)):
            sizes = {s.shape[d] for _, s in there if s.shape[d] != 1}
            own = len(part.numbers) if d == dim else max(sizes, default=1)
            if source.shape[d] not in (1, own):
                found = [list(s.shape) for _, s in there]
                raise MergeError(
                    f"{self.where}: {name} has the shapes {found}, which do not fit together. {self.whole.advice}"
                )
        alike = len(there) == len(sources) and len({s.shape for s in sources}) == 1 and sources[0].shape[dim] == 1
        if alike:
            first = sources[0]
            differs = next((p for p, s in there[1:] if not _same(first, s)), None)
            if differs is None:
                # The rule of a mask counts the rows that it is of; what it makes of those of one rank is for all.
                return first.place() if self.axis == "T" and isinstance(first.place, MaskRule) else first.place
            # One value may stand for the one position that a rank has; for several it is the same on all ranks.
            if any(len(p.numbers) > 1 for p in self.parts) and self.axis == "H":
                raise MergeError(
                    f"{self.where}: the {name}, which all heads have in common, differs between "
                    f"{self.parts[0].label} and {differs.label}. {self.whole.advice}"
                )
        others = [max(s.shape[d] for _, s in there) for d in range(4)]
        return self._joined(
            dim, [Piece(s, 0, len(p.numbers)) for p, s in zip(self.parts, sources, strict=True)], others
        )


def _same(one: Source, other: Source) -> bool:
    assert one.place is not None and not isinstance(one.place, Derived)
    assert other.place is not None and not isinstance(other.place, Derived)
    return same(one.place, other.place)


def has_keys(call: Call) -> bool:
    """Whether keys or values of a call are at hand, with a head of their own."""
    return any(held.get(name) is not None for held in (call.fields, call.beside) for name in ("k", "v"))


def count_along(call: Call, axis: str) -> int | None:
    """How many heads, query rows or batch entries of a call were kept; None: nothing that was kept tells."""
    return extents_of(call, axis).known(axis).get(axis)
