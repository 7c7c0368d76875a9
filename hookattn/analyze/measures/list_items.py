"""Attention between the items of a list."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any, ClassVar

from torch import Tensor

from ... import checks
from ...errors import MeasureError
from ...tokens.words import is_punctuation, split_words
from .lexical import WordPairs, piece_pairs

Item = range
_SEPARATORS = frozenset(",;")
_CONJUNCTIONS = frozenset(("and", "or", "&"))
_BULLETS = frozenset("-*•–+·")
_NUMBER = re.compile(r"\d{1,3}|[A-Za-z]")


@dataclass(frozen=True)
class ListItems(WordPairs):
    """The weight of a list's item on the other items of the list; see :class:`~hookattn.analyze.pairs.PairMass`.

    A list is three or more items of at most ``longest`` words, set apart by commas, semicolons, "and" or "or" ("apples,
    ripe pears and plums"); as nothing shows where its first item begins and its last one ends, these have no more words
    than the longest of the others. Or it is two or more lines that begin with a bullet or a number.

    Args:
        longest: how many words an item may have.
    """

    name: ClassVar[str] = "list_items"
    longest: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "longest", checks.whole("ListItems: longest", self.longest, 1, error=MeasureError))

    def related(self, tokens: tuple[Any, ...]) -> Tensor:
        """See :class:`~hookattn.analyze.pairs.PairMass`."""
        return _related(tokens, self.longest)


@lru_cache(maxsize=256)
def _related(tokens: tuple[str, ...], longest: int) -> Tensor:
    words = split_words(tokens)
    texts = ["\n" if own else text for text, own in zip(words.texts, words.special, strict=True)]
    found = [*_inline_lists(texts, longest), *_line_lists(texts)]
    return piece_pairs(
        words, [(a, b) for items in found for one, two in permutations(items, 2) for a in one for b in two]
    )


def _inline_lists(texts: list[str], longest: int) -> Iterator[list[Item]]:
    """The lists within sentences."""
    for clause in _split(texts, range(len(texts)), lambda text: text not in _SEPARATORS and _breaks(text)):
        parts = _split(texts, clause, lambda text: text in _SEPARATORS or text.casefold() in _CONJUNCTIONS)
        parts = [part for part in parts if part]  # ", and" parts twice
        at = 1
        while at < len(parts) - 1:
            stop = at
            while stop < len(parts) - 1 and len(parts[stop]) <= longest:
                stop += 1
            if stop > at:
                inner = parts[at:stop]
                n = max(map(len, inner))
                yield [parts[at - 1][-n:], *inner, parts[stop][:n]]
            at = stop + 1


def _line_lists(texts: list[str]) -> Iterator[list[Item]]:
    """The lists whose items are lines."""
    items: list[Item] = []
    for line in [*_split(texts, range(len(texts)), lambda text: "\n" in text), range(0)]:
        start = _marked(texts, line)
        if start:
            items.append(line[start:])
            continue
        if len(items) > 1:
            yield items
        items = []


def _marked(texts: list[str], line: Item) -> int:
    """How many words the mark takes that a line of a list begins with."""
    first = texts[line[0]] if line else ""
    if first in _BULLETS:
        return 1
    return 2 if len(line) > 1 and _NUMBER.fullmatch(first) and texts[line[1]] in (".", ")") else 0


def _breaks(text: str) -> bool:
    return "\n" in text or (is_punctuation(text) and text.casefold() not in _CONJUNCTIONS and text != "-")


def _split(texts: list[str], span: Item, ends: Any) -> list[Item]:
    """The runs of words between those that end one; such as are empty too."""
    made, start = [], span.start
    for i in span:
        if ends(texts[i]):
            made.append(range(start, i))
            start = i + 1
    return [*made, range(start, span.stop)]
