"""Attention that a model computes piece by piece (query chunks, head by head, sample by sample) as one call.

A model that saves memory runs its kernel several times where another runs it once. What each of these calls is a piece
of is known from what its queries were cut off (:class:`~hookattn.attention.pieces.Piece`). Where the pieces are all of
it, they become one call when the trace ends; where they are not, or cannot be put together, each says which part it is;
and where nothing is known of it, each says how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from ..attention.functional import sink_column
from ..attention.kernel_call import DERIVED, FIELD_SPECS, OUTPUT_GRADIENT, FieldSpec
from ..attention.pieces import Piece
from ..calls.call import Call, joint_basis
from ..calls.certificate import joined
from ..calls.deriving import derive_field
from ..calls.extents import extents_of
from ..calls.fields import Derived, Field, Later, Place, tensor_of
from ..calls.output_gradient import OutputGradient
from ..torch_internals.isolation import isolated
from .edits_of_pieces import edits_of_pieces

# What the pieces of one attention have in common.
_ALIKE = (
    "tap",
    "dtype",
    "softcap",
    "causal",
    "window",
    "dropout",
    "own_scores",
    "mixed",
    "score",
    "normalizer",
    "derivable",
)
_WORDS = {"B": "batch entries", "H": "heads", "T": "queries"}


class Pieces:
    """The pieces of the calls of one trace."""

    def __init__(self) -> None:
        self._of: dict[int, Piece] = {}  # by the identity of the call, which the trace holds

    def note(self, call: Call, piece: Piece) -> None:
        """Say which part of one attention a call is."""
        self._of[id(call)] = piece

    def put_together(self, calls: list[Call], merge: bool) -> None:
        """Put the pieces of each attention together, and number the calls anew.

        Args:
            calls: all of the trace, complete; changed in place.
            merge: whether calls may be replaced; else each only says which part it is.
        """
        if len({(call.site.path, call.step) for call in calls}) == len(calls):  # mostly each site has made one call
            self._of.clear()
            return
        changed = False
        made: list[Call] = []
        for run in _runs(calls):
            if len(run) > 1:
                changed = True
                made += self._of_one_site(run, merge)
            else:
                made += run
        self._of.clear()
        if not changed:
            return
        calls[:] = made
        for i, call in enumerate(calls):
            call.index = i

    def _of_one_site(self, run: Sequence[Call], merge: bool) -> list[Call]:
        """Calls of one site and step: those that are pieces of one attention become one."""
        made: list[Call] = []
        for key, group in groupby(run, self._whole):
            pieces = list(group)
            found = [self._of[id(call)] for call in pieces] if key is not None else []
            one = _merged(pieces, found) if merge and _tile(found) else None
            made += [one] if one is not None else pieces
            if one is None:
                for call, piece in zip(pieces, found, strict=False):
                    _say_part(call, piece)
        if len(made) > 1:
            for number, call in enumerate(made, 1):
                call.notes = (*call.notes, f"{number} of {len(made)} calls that this module made in this step")
        return made

    def _whole(self, call: Call) -> tuple[int, object] | None:
        piece = self._of.get(id(call))
        return None if piece is None else (id(piece.whole), piece.axes)


def _runs(calls: Sequence[Call]) -> Iterator[list[Call]]:
    """Calls of one site and step that follow each other."""
    for _, run in groupby(calls, lambda c: (c.site.path, c.site.layer, c.step)):
        yield list(run)


def _tile(pieces: Sequence[Piece]) -> bool:
    """Whether some pieces are all of what they were cut off, in its order."""
    if len(pieces) < 2:
        return False
    ends = [0, *(p.stop for p in pieces)]
    return [p.start for p in pieces] == ends[:-1] and ends[-1] == pieces[0].of


def _say_part(call: Call, piece: Piece) -> None:
    """Which batch entries, heads or queries a call holds of an attention whose other pieces are not with it."""
    known, rows = extents_of(call, "BHGT").known(), piece.stop - piece.start
    extent = 1
    for letter in piece.letters:
        extent *= known.get(letter, 0)
    selected = call.heads is not None or call.queries is not None
    if extent != rows and not selected:
        return
    # Of what this process has: the whole model's numbers begin elsewhere.
    cut = next((shard for shard in call.shards if shard.axis == piece.letters), None)
    start = 0 if cut is None else cut.start
    if start is None:
        pass
    elif piece.letters == "T" and not selected:
        call.queries = tuple(range(start + piece.start, start + piece.stop))
        call.of_queries = piece.of if cut is None else cut.of
    elif piece.letters == "H" and "G" in known and not selected:
        call.heads = tuple(range(start + piece.start, start + piece.stop))
        call.kv_heads = tuple(h * known["G"] // rows for h in range(rows))
    where = " and ".join(_WORDS[x] for x in piece.letters)
    some = str(piece.start) if rows == 1 else f"{piece.start} to {piece.stop - 1}"
    call.notes = (*call.notes, f"a part of one attention: {where} {some} of {piece.of}")


def _merged(calls: Sequence[Call], pieces: Sequence[Piece]) -> Call | None:
    """One call of the pieces of one attention; None where they do not fit together."""
    calls = _without_what_edits_made_differ(calls)
    first, letters = calls[0], pieces[0].letters
    if any(getattr(c, name) != getattr(first, name) for c in calls for name in _ALIKE):
        return None
    if ("H" in letters and any(c.heads is not None for c in calls)) or len({c.heads for c in calls}) > 1:
        return None
    if ("T" in letters and any(c.queries is not None for c in calls)) or len({c.queries for c in calls}) > 1:
        return None
    if any(c.fields.keys() != first.fields.keys() or c.beside.keys() != first.beside.keys() for c in calls):
        return None
    if not FIELD_SPECS.keys() >= first.fields.keys():  # statistics
        return None
    shapes = [_shape(call) for call in calls]
    joint = _Joint(pieces[0].axes, [shape for shape in shapes if shape is not None])
    if len(joint.shapes) < len(calls) or not joint.fits([p.stop - p.start for p in pieces]):
        return None
    try:
        made = replace(
            first,
            scale=joint.scale([c.scale for c in calls]),
            fields={name: joint.field(name, [c.fields[name] for c in calls]) for name in first.fields},
            beside={name: joint.field(name, [c.beside[name] for c in calls]) for name in first.beside},
            certificate=joined([c.certificate for c in calls]),
        )
    except _Apart:
        return None
    gradients = [c.gradient for c in calls if c.gradient is not None]
    if len(gradients) == len(calls):
        made.gradient = _JointGradient(passes=gradients[0].passes, parts=gradients, joint=joint)
    if "T" in letters:  # each piece had a diagonal of its own; the mask has them
        made.causal, made.window = False, None
    made.basis = joint_basis(calls)
    if joint.folded:
        made.basis |= {x: "followed" for x in "BHG" if x in made.basis and made.basis[x] == "guessed"}
    made.edits = edits_of_pieces(calls, pieces)
    what = " and ".join(_WORDS[x] for x in letters)
    notes = dict.fromkeys(note for c in calls for note in c.notes)
    made.notes = (*notes, f"put together of {len(calls)} calls of its kernel, each of some {what}")
    return made


def _without_what_edits_made_differ(calls: Sequence[Call]) -> list[Call]:
    """The pieces, alike where an edit has made some of them differ: what it has set in one follows in none."""
    if not any(c.edits for c in calls):
        return list(calls)
    derivable = tuple(name for name in calls[0].derivable if all(name in c.derivable for c in calls))
    own_scores = any(c.own_scores for c in calls)
    by_edits = own_scores and all(c.own_by_edits or not c.own_scores for c in calls)
    made = []
    for call in calls:
        fields = {
            name: derive_field(call, name) if isinstance(place, Derived) and name not in derivable else place
            for name, place in call.fields.items()
        }
        beside = call.beside
        if own_scores and "scores" not in fields:  # what one piece holds beside, to derive its weights
            beside = {name: place for name, place in beside.items() if name not in DERIVED}
        one = replace(
            call, fields=fields, beside=beside, derivable=derivable, own_scores=own_scores, own_by_edits=by_edits
        )
        one.gradient = call.gradient
        made.append(one)
    return made


def _shape(call: Call) -> dict[str, int] | None:
    """B, H and T of a call; None: what was kept of it does not tell."""
    known = extents_of(call, "BHT").known("BHT")
    return known if len(known) == 3 else None


class _Apart(Exception):
    """Fields that cannot be put together."""


class _Joint:
    """How the fields of several pieces are put together.

    Args:
        axes: the letters of what was cut, and their extents.
        shapes: B, H and T of each piece.
    """

    def __init__(self, axes: Sequence[tuple[str, int]], shapes: Sequence[dict[str, int]]):
        self.axes, self.shapes = axes, shapes
        self.letters = "".join(letter for letter, _ in axes)
        self.folded = len(axes) > 1

    def fits(self, rows: Sequence[int]) -> bool:
        """Whether the pieces have as many rows as was cut off for each, and are alike otherwise."""
        if self.folded:
            if set(self.letters) != {"B", "H"}:
                return False
            found = [shape["B"] * shape["H"] for shape in self.shapes]
            rest = ["T"]
        else:
            found = [shape[self.letters] for shape in self.shapes]
            rest = [x for x in "BHT" if x != self.letters]
        return found == list(rows) and all(len({shape[x] for shape in self.shapes}) == 1 for x in rest)

    def field(self, name: str, places: Sequence[Field]) -> Field:
        """One field of all pieces."""
        if all(isinstance(x, Derived) for x in places) or all(x is None for x in places):
            return places[0]
        if any(isinstance(x, Derived) for x in places):
            raise _Apart
        parts = [tensor_of(x) for x in places if not isinstance(x, Derived)]
        found = [x for x in parts if x is not None]
        if len(found) < len(places):
            if name != "bias":
                raise _Apart
            found = [found[0].new_zeros(1, 1, 1, 1) if x is None else x for x in parts]
        if name == "sinks":
            found = [sink_column(x) for x in found]
        with isolated(found[0], but=any(x.requires_grad for x in found)):
            return self.tensor(FIELD_SPECS[name], found)

    def scale(self, scales: Sequence[float | Tensor | None]) -> float | Tensor | None:
        """The scale of all."""
        tensors = [x for x in scales if isinstance(x, Tensor)]
        if len(tensors) == len(scales):
            with isolated(tensors[0], but=any(x.requires_grad for x in tensors)):
                return self.tensor(FIELD_SPECS["bias"], tensors)
        if tensors or any(x != scales[0] for x in scales):
            raise _Apart
        return scales[0]

    def tensor(self, spec: FieldSpec, parts: list[Tensor]) -> Tensor:
        """The tensors of all, put together."""
        dims = [0, 1] if self.folded else ["BHT".index(self.letters)]
        if spec.per_key_head and self.letters == "T":
            return _one(parts)
        if spec.broadcast and all(x.shape[d] == 1 for x in parts for d in dims) and all(map(_equal, parts, parts[1:])):
            return parts[0]  # else they are of one row each, every one its own
        if spec.broadcast:  # it may have size 1 in some pieces, and stands for all of these then
            full = [max(sizes) for sizes in zip(*(x.shape for x in parts), strict=True)]
            parts = [
                x.expand([shape["BHT"[d]] if d in dims else n for d, n in enumerate(full)])
                for x, shape in zip(parts, self.shapes, strict=True)
            ]
        if not self.folded:
            return self._groups(parts) if spec.per_key_head and self.letters == "H" else _cat(parts, dims[0])
        if spec.per_key_head:
            parts = [
                x.repeat_interleave(shape["H"] // x.shape[1], 1) for x, shape in zip(parts, self.shapes, strict=True)
            ]
        rows = _cat([x.flatten(0, 1) for x in parts], 0)
        whole = rows.view(*(extent for _, extent in self.axes), *rows.shape[1:])
        return whole if self.letters == "BH" else whole.transpose(0, 1)

    def _groups(self, parts: list[Tensor]) -> Tensor:
        """Keys or values of all heads, those that several pieces share once."""
        heads = [shape["H"] for shape in self.shapes]
        if all(x.shape[1] == 1 for x in parts):
            runs: list[tuple[Tensor, int]] = []  # keys, and how many heads in a row read them
            for x, n in zip(parts, heads, strict=True):
                if runs and _equal(runs[-1][0], x):
                    runs[-1] = (x, runs[-1][1] + n)
                else:
                    runs.append((x, n))
            if len({n for _, n in runs}) == 1:
                return _cat([x for x, _ in runs], 1)
        if len({n // x.shape[1] for x, n in zip(parts, heads, strict=True)}) > 1:
            raise _Apart
        return _cat(parts, 1)


@dataclass(eq=False)
class _JointGradient(OutputGradient):
    """The gradient of what several pieces are.

    Attributes:
        parts: that of each piece; one that no backward has reached, where it reached others, is 0.
        joint: puts them together.
    """

    parts: Sequence[OutputGradient] = ()
    joint: _Joint = field(default_factory=lambda: _Joint((), ()))

    def __post_init__(self) -> None:
        self.why_none = next((part.why_none for part in self.parts if part.why_none), "")

    @property
    def there(self) -> Place | None:
        """Where it is; None: there is none."""
        if self.place is not None:
            return self.place
        if self.why_none or all(part.there is None for part in self.parts):
            return None
        return Later(self._whole)

    def _whole(self) -> Tensor:
        found = [tensor_of(part.there) for part in self.parts]
        some = next(x for x in found if x is not None)
        shapes = [(shape["B"], shape["H"], shape["T"], some.shape[3]) for shape in self.joint.shapes]
        parts = [some.new_zeros(n) if x is None else x for x, n in zip(found, shapes, strict=True)]
        with isolated(some):
            return self.joint.tensor(OUTPUT_GRADIENT, parts)


def _cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    shapes = {(*x.shape[:dim], *x.shape[dim + 1 :]) for x in parts}
    if len(shapes) > 1:
        raise _Apart
    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]


def _one(parts: Sequence[Tensor]) -> Tensor:
    """What all pieces have alike."""
    if not all(_equal(x, parts[0]) for x in parts[1:]):
        raise _Apart
    return parts[0]


def _equal(x: Tensor, y: Tensor) -> bool:
    return x is y or (x.shape == y.shape and torch.equal(x, y))
