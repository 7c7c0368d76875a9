"""What was cut off what: query chunks, slices over heads and loops over samples, by where they lie in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ...attention.pieces import Piece
from ...torch_internals.tensor_identity import storage_of
from .axis_history import Atom, Origin
from .products import HeadTest


def place_in(x: Tensor, out: Tensor) -> tuple[tuple[int, ...], int, int] | None:
    """The dimensions of a tensor that a view of it was cut along, the first entry and one after the last.

    None: it is no such part of it.
    """
    missing, storage = x.dim() - out.dim(), storage_of(out)
    if not 0 <= missing <= 2 or not storage or storage != storage_of(x) or not x.numel() or not out.numel():
        return None
    shape, steps = x.shape, x.stride()
    offset = int(out.storage_offset()) - int(x.storage_offset())
    if missing == 0:
        dims = [d for d, (m, n) in enumerate(zip(shape, out.shape, strict=True)) if m != n]
        if len(dims) != 1 or any(out.shape[d] > 1 and out.stride(d) != steps[d] for d in range(x.dim())):
            return None
        count = out.shape[dims[0]]
    else:
        dims, kept = [], list(zip(out.shape, out.stride(), strict=True))
        for d, one in enumerate(zip(shape, steps, strict=True)):
            if kept and kept[0] == one:
                kept.pop(0)
            else:
                dims.append(d)
        if kept or len(dims) != missing:
            return None
        count = 1
    start = 0
    for d in sorted(dims, key=lambda d: -steps[d]):
        place, offset = divmod(offset, steps[d]) if steps[d] else (0, offset)
        start += place * math.prod(shape[e] for e in dims if e > d)
    extent = math.prod(shape[d] for d in dims)
    if offset or not 0 <= start <= extent - count:
        return None
    return tuple(dims), start, start + count


def piece_of(query: Origin, named: Mapping[Atom, str], width: Iterable[Atom], keys: Iterable[Atom]) -> Piece | None:
    """Which part of one attention a call is, by what its queries were cut off; None: of nothing that is known.

    Args:
        query: the origin of the queries.
        named: B, H, T or D for their atoms.
        width: the axis that q·k sums over.
        keys: the axis that the softmax runs over.
    """
    cut = query.cut
    if cut is None:
        return None
    whole = [a for d in cut.dims for a in cut.source.layout()[d]]
    if not whole or math.prod(a.size for a in whole) != math.prod(cut.source.shape[d] for d in cut.dims):
        return None
    of: dict[Atom, str] = {}
    for atom, letter in named.items():
        for line in (atom, *atom.lineage()):
            of[line] = letter if of.get(line, letter) == letter else ""  # a width that heads were split from, say
    lines = {a.root for a in keys}
    is_head = HeadTest(list(width))
    in_none = len(cut.dims) == 1 and not any(a in of for a in whole)
    if in_none and [x for a, x in named.items() if a.birth == "lost"] == [
        "T"
    ]:  # some entries of several axes that lie as one
        of = dict.fromkeys(whole, "T")
    axes = []
    for atom in whole:
        found = of.get(atom)
        if found is None and is_head(atom):
            found = "H"
        elif found is None and atom.birth == "data":
            found = "T" if atom.root in lines else _missing(named.values())
        if not found or found not in "BHT":
            return None
        axes.append((found, atom.size))
    if len({letter for letter, _ in axes}) < len(axes):
        axes = _joined(axes)
    return Piece(cut.mark, tuple(axes), cut.start, cut.stop) if axes else None


def _missing(letters: Iterable[str]) -> str | None:
    """Whether positions or batch entries were cut, by which of them are there still; None: neither or both are."""
    found = {*letters} & {"B", "T"}
    return None if not found else "B" if "T" in found else "T"


def _joined(axes: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Neighbours of one letter as one axis; none where a letter is there twice all the same."""
    out: list[tuple[str, int]] = []
    for letter, extent in axes:
        if out and out[-1][0] == letter:
            out[-1] = (letter, out[-1][1] * extent)
        else:
            out.append((letter, extent))
    return out if len({letter for letter, _ in out}) == len(out) else []
