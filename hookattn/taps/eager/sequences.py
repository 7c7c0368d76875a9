"""What the axes of queries and keys tell of a whole call: whether they are one sequence, and which part it is.

An adapter, or the path of a module, says of what kind an attention is. Where the whole model is followed, the axes of
its queries and keys say it for certain: positions keep their line from the model's input on, through learned maps and
views, so that two sequences are two where their axes began apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ...attention.kernel_call import KernelCall
from .axis_history import Atom, Cut, Origin
from .cuts import piece_of
from .products import LayoutError, Product, Roles

_LETTERS = "BHTD"


def describe_plain(call: KernelCall, query: Origin, key: Origin) -> None:
    """Say of a call with B H T D operands what their axes tell.

    Args:
        call: gets its kind and piece.
        query: the origin of its q.
        key: that of its k.
    """
    q, k = query.layout(), key.layout()
    if len(q) == len(k) == len(_LETTERS):
        named = {a: letter for letter, dim in zip(_LETTERS, q, strict=True) for a in dim}
        named |= dict.fromkeys(_one_entry(query, 2), "T")
        _describe(call, (query, key), named, q[2] or _one_entry(query, 2), k[2] or _one_entry(key, 2), q[3], k[3])


def describe_product(call: KernelCall, product: Product, roles: Roles) -> None:
    """The same of a call whose scores are a product of operands in any layout."""
    if roles.queries not in ("a", "b"):
        return
    first = roles.queries == "a"
    origins = (product.origin_a, product.origin_b) if first else (product.origin_b, product.origin_a)
    named: dict[Atom, str] = {}
    keys: list[Atom] = []
    try:
        for label in product.lo:
            for matched in product.matched.get(label, ()):
                letter = roles.of(matched.out)
                q, k = (matched.a, matched.b) if first else (matched.b, matched.a)
                if q is not None:
                    named[q] = letter
                if k is not None and letter == "S":
                    keys.append(k)
    except LayoutError:
        return
    of_q, of_k = (product.widths[side] for side in (("a", "b") if first else ("b", "a")))
    queries = [a for a, letter in named.items() if letter == "T"]
    own = [[x for x in labels if x in product.lo] for labels in ((product.la, product.lb)[:: 1 if first else -1])]
    one = [
        [a for dim, x in enumerate(labels) if x in own[i] and x not in own[1 - i] for a in _one_entry(origins[i], dim)]
        for i, labels in enumerate((product.la, product.lb)[:: 1 if first else -1])
    ]
    named |= dict.fromkeys(one[0], "T")
    queries, keys = queries or one[0], keys or one[1]
    _describe(call, origins, named, queries, keys, of_q, of_k)


def _one_entry(origin: Origin, dim: int) -> list[Atom]:
    """The axis of one query or one key, or what it was before one was taken; none where there are several, or none is
    known."""
    full = origin.full()
    return [a for a in full[dim] if a.size == 1 and a.birth in ("data", "parameter")] if dim < len(full) else []


def _describe(
    call: KernelCall,
    origins: tuple[Origin, Origin],
    named: Mapping[Atom, str],
    queries: Sequence[Atom],
    keys: Sequence[Atom],
    q_width: Iterable[Atom],
    k_width: Iterable[Atom],
) -> None:
    widths = [*q_width, *k_width]
    if widths and all(a.birth == "feature" for a in widths):
        call.kind = kind_of(queries, keys)
    query, key = origins
    if query.cut is not None and not _tells_them_apart(query.cut, key.cut):
        call.piece = piece_of(query, named, list(q_width), keys)


def _tells_them_apart(query: Cut, key: Cut | None) -> bool:
    """Whether a cut tells queries from keys, and no pieces: both are of one tensor, at different places."""
    return key is not None and key.source is query.source and (key.start, key.stop) != (query.start, query.stop)


def kind_of(queries: Iterable[Atom], keys: Iterable[Atom]) -> str | None:
    """The kind of an attention, where the axes of its queries and keys tell.

    ``cross`` where they have nothing in common, or learned queries read more than themselves; ``joint`` where both are
    the same sequences laid end to end; ``self`` where both are of one sequence, as are a memory and what attends to it
    if they are made of one input. None: nothing tells, or they have a part in common.

    Args:
        queries: their axis, or the axes that it is made of.
        keys: likewise.
    """
    # Features are heads that lie in one axis with the positions.
    ours, theirs = ([a for a in side if a.birth != "feature"] for side in (queries, keys))
    if not ours or not theirs or not all(map(_sure, (*ours, *theirs))):
        return None
    mine, others = _roots(ours), _roots(theirs)
    if not mine & others:
        return "cross"
    # A token that was learned and put in front is no sequence.
    laid = any(len([root for root in (a.root, *a.beside) if root.birth == "data"]) > 1 for a in ours)
    if mine != others:
        # Learned queries read a sequence that they are laid beside, as in a perceiver.
        reads = mine < others and all(root.birth == "parameter" for root in mine)
        return "cross" if reads and any(root.birth == "data" for root in others) else None
    return "joint" if laid else "self"


def _sure(atom: Atom) -> bool:
    """Whether it is known where a line began: not in an operation that is not followed, nor in a map of positions."""
    return atom.birth in ("data", "parameter") and not atom.repeated and not atom.root.maps


def _roots(atoms: Iterable[Atom]) -> set[Atom]:
    return {root for a in atoms for root in (a.root, *a.beside)}
