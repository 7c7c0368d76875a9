"""Labels of tokens, which a caller or the trace gives, held against a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import checks
from ..calls.key_tokens import cross_positions, key_positions, lists_of_keys, lists_of_queries
from ..errors import MeasureError
from ..tokens.words import split_words
from .call_view import View

Rows = tuple[tuple[Any, ...], ...]
PADDING = "[PAD]"


def as_label_rows(labels: Any, what: str) -> Rows:
    """Labels as tuples: one for each token, or one such list for each batch entry.

    Args:
        labels: a list, a list of lists, or a tensor S or B S, of text, ints or None.
        what: what they are called in an error.

    Raises:
        MeasureError: they are something else.
    """
    if isinstance(labels, Tensor):
        labels = _listed(labels)
    good = isinstance(labels, Sequence) and not isinstance(labels, (str, bytes)) and len(labels) > 0
    if good:
        rows = [_listed(r) if isinstance(r, Tensor) else r for r in labels]
        nested = [isinstance(r, Sequence) and not isinstance(r, (str, bytes)) and len(r) > 0 for r in rows]
        flat = rows if not any(nested) else [x for r, n in zip(rows, nested, strict=True) if n for x in r]
        good = all(nested) or not any(nested)
        if good and all(x is None or isinstance(x, (str, int)) for x in flat):
            return tuple(map(tuple, rows)) if any(nested) else (tuple(rows),)
    raise MeasureError(
        f"{what}: expected one label (text, an int or None) for each token, or one such list for each batch entry; "
        f"got {checks.printed(labels)}."
    )


def _listed(labels: Tensor) -> Any:
    """A tensor's numbers; itself, where it has none that can be read."""
    return labels if labels.is_meta or labels.is_sparse else labels.tolist()


def key_labels(view: View, labels: Rows | None = None, what: str = "tokens") -> list[tuple[Any, ...]] | str:
    """B S: the labels of the keys of each batch entry; text: why there are none, or not of every key.

    Args:
        view: the call, whose queries and keys are of one sequence.
        labels: one list for each batch entry, or one for all; None: the tokens of the trace.
        what: what they are called.
    """
    return _labels_of_keys(view, labels, what, whole=True)


def named_keys(view: View) -> list[tuple[str | None, ...]] | str:
    """B S: the trace's token of each key of each batch entry, None behind a prompt's; text: why there are none."""
    return _labels_of_keys(view, None, "tokens", whole=False)


def named_queries(view: View) -> list[list[str | None]]:
    """B T: the token of each query of each batch entry; None where it is not known."""
    b, _, t, _ = view.shape
    unknown: list[list[str | None]] = [[None] * t] * b
    if view.crosses:
        lists = lists_of_queries(view.traced, view.trace)
        if isinstance(lists, str) or len(lists) not in (1, b):
            return unknown
        places = cross_positions(view.traced, view.trace, t, {len(row) for row in lists})
        if places is None:
            return unknown
        rows = [[row[i] if i < len(row) else None for i in places] for row in lists]
        return rows * b if len(rows) == 1 else rows
    found = named_keys(view)
    if isinstance(found, str) or view.positions is None or view.lost:
        return unknown
    at = view.positions.expand(b, t).tolist()
    return [[row[i] if i < len(row) else None for i in places] for row, places in zip(found, at, strict=True)]


def _labels_of_keys(view: View, labels: Rows | None, what: str, *, whole: bool) -> list[tuple[Any, ...]] | str:
    return view.once(("labels of keys", labels, what, whole), lambda: _found_labels(view, labels, what, whole))


def _found_labels(view: View, labels: Rows | None, what: str, whole: bool) -> list[tuple[Any, ...]] | str:
    given = lists_of_keys(view.traced, view.trace) if labels is None else labels
    if isinstance(given, str):
        return given
    b, _, _, s = view.shape
    if len(given) not in (1, b):
        return f"the {what} don't fit: {len(given)} lists for {b} batch entries"
    lengths = {len(row) for row in given}
    at = key_positions(view.traced, view.trace, s, lengths)
    if at is None or at.start >= min(lengths) or (whole and at.stop > min(lengths)):
        counts = ", ".join(map(str, sorted(lengths)))
        last = f", which end at token {at.stop - 1}" if at is not None and at.start else ""
        return f"the {what} don't fit: lists of {counts} for {s} keys{last}"
    rows = [tuple(row[i] if i < len(row) else None for i in at) for row in given]
    return rows * b if len(rows) == 1 else rows


def with_padding_marked(view: View, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The same, with :data:`PADDING` in place of every key that is no real token.

    Args:
        view: the call.
        rows: B S.
    """
    real = view.keys
    if bool(real.all()):
        return list(rows)
    return [
        tuple(x if own else PADDING for x, own in zip(row, keep, strict=True))
        for row, keep in zip(rows, real.tolist(), strict=True)
    ]


def piece_labels(view: View, labels: Rows, what: str) -> list[tuple[Any, ...]] | str:
    """B S: labels of tokens as they are; labels of words (special tokens are none) given to each of their pieces.

    Args:
        view: the call.
        labels: for each batch entry one a token, or one a word.
        what: what they are called.
    """
    direct = key_labels(view, labels, what)
    tokens = lists_of_keys(view.traced, view.trace)
    if isinstance(tokens, str) or len(tokens) not in (1, len(labels)):
        return direct
    owned = list(tokens) * (len(labels) if len(tokens) == 1 else 1)
    if [len(row) for row in labels] == [len(own) for own in owned]:
        return direct
    made: list[tuple[Any, ...]] = []
    for row, own in zip(labels, owned, strict=True):
        words = split_words(tuple(own))
        ordinary = words.ordinary()
        if len(row) != len(ordinary):
            return f"{direct} and {len(ordinary)} words" if isinstance(direct, str) else direct
        of = dict(zip(ordinary, row, strict=True))
        made.append(tuple(of.get(word) for word in words.of))
    return key_labels(view, tuple(made), what)
