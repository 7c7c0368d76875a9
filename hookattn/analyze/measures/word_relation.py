"""Whether a head looks from words to the words that labels relate them to: syntax, coreference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ... import checks
from ...errors import MeasureError
from ..call_view import View
from ..labels import Rows, as_label_rows
from ..reading import Reading
from ..tables.pool import word_weights, words_of
from .base import Measure

HOW = ("argmax", "mass")


@dataclass(frozen=True, kw_only=True)
class WordRelation(Measure):
    """What of the words that have related words, which they may attend to, falls to these.

    ``argmax``: the share of them whose largest weight, among the other words that are no special tokens, is on a
    related one (Clark et al. 2019). ``mass``: the mean weight on all related ones. Weights are those of words, see
    :func:`hookattn.analyze.pool_words`; words are counted from 0, without special tokens. Subclasses write
    :meth:`related`.

    Args:
        how: ``"argmax"`` or ``"mass"``.
        words: ids of words for each token, see :func:`hookattn.analyze.pool_words`.
    """

    unit: ClassVar[str] = "share"
    positional: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("weights", "mask")
    how: str = "argmax"
    words: Rows | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.words is not None:
            object.__setattr__(self, "words", as_label_rows(self.words, f"{self.name}: words"))
        checks.word(f"{type(self).__name__}: how", self.how, HOW, MeasureError)

    def related(self, example: int, count: int, total: int) -> list[tuple[int, int]]:
        """Pairs of words of one batch entry: from which to which.

        Args:
            example: the batch entry.
            count: how many batch entries there are.
            total: how many words it has.

        Raises:
            MeasureError: the labels don't fit.
        """
        raise NotImplementedError

    def read(self, view: View) -> Reading:
        """See :class:`~hookattn.analyze.Measure`."""
        words = words_of(view, self.words)
        weights, mask = word_weights(view, words)
        b, _, w, _ = weights.shape
        related = torch.zeros(b, w, w, dtype=torch.bool)
        other = torch.zeros(b, w, w, dtype=torch.bool)
        for i, own in enumerate(words):
            ordinary = torch.tensor(own.ordinary(), dtype=torch.int64)
            pairs = torch.tensor(self.related(i, b, len(ordinary)), dtype=torch.int64).view(-1, 2).T
            related[i, ordinary[pairs[0]], ordinary[pairs[1]]] = True
            other[i, ordinary.unsqueeze(1), ordinary] = True
        # A word may not compete with itself: a head that rests on the word it is at would hide where it looks else.
        other &= ~torch.eye(w, dtype=torch.bool)
        other = other.to(weights.device) & mask.any(1)
        related = related.to(weights.device) & other
        counted = related.any(-1)
        if self.how == "mass":
            values = torch.where(related.unsqueeze(1), weights, 0.0).sum(-1)
        else:
            top = torch.where(other.unsqueeze(1), weights, -1.0).max(-1)
            hit = related.unsqueeze(1).expand_as(weights).gather(-1, top.indices.unsqueeze(-1)).squeeze(-1)
            values = torch.where(top.values.isnan(), torch.nan, (hit & (top.values > 0)).to(weights.dtype))
        return Reading(view.mean(values, counted), counted.sum(-1))


def labels_of_example(labels: Sequence[Any], example: int, count: int, what: str) -> Any:
    """The labels of one batch entry.

    Raises:
        MeasureError: there are neither as many as batch entries nor one for all.
    """
    if len(labels) not in (1, count):
        raise MeasureError(f"{what}: expected one list for each of {count} batch entries, got {len(labels)}.")
    return labels[0 if len(labels) == 1 else example]


@dataclass(frozen=True, kw_only=True)
class Dependency(WordRelation):
    """Words and their syntactic heads, see :class:`WordRelation`.

    Args:
        heads: for each word the word that is its head; itself, −1 or None where it is the root; one list, or one for
            each batch entry.
        relations: for each word the name of its relation to its head, as ``"nsubj"``.
        relation: only words with this relation to their head.
        direction: ``"head"``: from a word to its head; ``"dependent"``: from a head to its dependents.

    Raises:
        MeasureError: labels of another form, another direction.
    """

    name: ClassVar[str] = "dependency"
    heads: Rows = field(repr=False)
    relations: Rows | None = field(default=None, repr=False)
    relation: str | None = None
    direction: str = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "heads", as_label_rows(self.heads, "dependency: heads"))
        if self.relations is not None:
            object.__setattr__(self, "relations", as_label_rows(self.relations, "dependency: relations"))
        if any(isinstance(x, (str, bool)) for row in self.heads for x in row):
            raise MeasureError("dependency: heads: expected the number of a word, or None, got text or a bool.")
        checks.word("Dependency: direction", self.direction, ("head", "dependent"), MeasureError)
        if self.relation is not None:
            checks.text("Dependency: relation", self.relation, "the name of a relation", MeasureError)
        if (self.relation is None) != (self.relations is None):
            raise MeasureError("dependency: expected both relations= and relation=, or neither.")

    def related(self, example: int, count: int, total: int) -> list[tuple[int, int]]:
        """See :class:`WordRelation`."""
        heads = labels_of_example(self.heads, example, count, "dependency: heads")
        names = (
            labels_of_example(self.relations, example, count, "dependency: relations")
            if self.relations
            else (None,) * total
        )
        for what, row in (("heads", heads), ("relations", names)):
            if len(row) != total:
                raise MeasureError(
                    f"dependency: {what} of batch entry {example}: expected one for each of {total} words, "
                    f"got {len(row)}."
                )
        bad = [x for x in heads if x is not None and not -1 <= x < total]
        if bad:
            raise MeasureError(f"dependency: heads of batch entry {example}: there is no word {bad[0]} of {total}.")
        pairs = [
            (word, head)
            for word, (head, name) in enumerate(zip(heads, names, strict=True))
            if head is not None and head not in (-1, word) and name == self.relation
        ]
        return pairs if self.direction == "head" else [(head, word) for word, head in pairs]


@dataclass(frozen=True, kw_only=True)
class Coreference(WordRelation):
    """From the words of a mention to those of its antecedents, see :class:`WordRelation`.

    Clark et al. (2019) have one word for each mention, its head.

    Args:
        clusters: for each batch entry a list of clusters, each a list of mentions, each the number of a word or
            ``(start, stop)``, words from start to before stop.

    Raises:
        MeasureError: clusters of another form.
    """

    name: ClassVar[str] = "coreference"
    clusters: tuple[tuple[tuple[range, ...], ...], ...] = field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            if isinstance(self.clusters, (str, bytes, Mapping)):
                raise TypeError
            made = tuple(
                tuple(tuple(map(_mention, mentions)) for mentions in labels_of_example)
                for labels_of_example in self.clusters
            )
        except (TypeError, ValueError, RuntimeError):
            raise MeasureError(
                "coreference: expected for each batch entry a list of clusters, each a list of mentions, each the "
                f"number of a word or (start, stop); got {checks.printed(self.clusters)}."
            ) from None
        object.__setattr__(self, "clusters", made)

    def related(self, example: int, count: int, total: int) -> list[tuple[int, int]]:
        """See :class:`WordRelation`."""
        made = []
        for mentions in labels_of_example(self.clusters, example, count, "coreference: clusters"):
            bad = [m for m in mentions if m.start < 0 or m.stop > total or not m]
            if bad:
                raise MeasureError(
                    f"coreference: clusters of batch entry {example}: words {bad[0].start} to {bad[0].stop} are not "
                    f"within its {total} words."
                )
            ordered = sorted(mentions, key=lambda m: (m.start, m.stop))
            for i, mention in enumerate(ordered):
                made += [(a, c) for a in mention for before in ordered[:i] for c in before if c not in mention]
        return made


def _mention(value: Any) -> range:
    if isinstance(value, range):
        return value
    if isinstance(value, int):
        return range(value, value + 1)
    start, stop = value
    return range(int(start), int(stop))
