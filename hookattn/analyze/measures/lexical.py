"""Attention between words that are written alike, and between brackets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import checks
from ...errors import MeasureError
from ...tokens.pieces import is_special
from ...tokens.words import Words, split_words
from ..call_view import View
from ..labels import key_labels, with_padding_marked
from ..pairs import PairMass
from .segments import segment_of, segments_of_keys

_BRACKETS = {")": "(", "]": "[", "}": "{", "⟩": "⟨", "»": "«", "”": "“", "）": "（", "】": "【", "」": "「"}


def pair_tensor(pairs: Iterable[tuple[int, int]]) -> Tensor:
    """2 P, int64, of pairs of places; each once, in order."""
    return torch.tensor(sorted(set(pairs)), dtype=torch.int64).view(-1, 2).T


def piece_pairs(words: Words, pairs: Iterable[tuple[int, int]]) -> Tensor:
    """2 P, int64: every piece of a word with every piece of another.

    Args:
        words: of a sequence.
        pairs: of words, by number.
    """
    of = words.tokens()
    return pair_tensor((i, j) for a, b in pairs for i in of[a] for j in of[b])


@dataclass(frozen=True)
class WordPairs(PairMass):
    """A :class:`PairMass` that is of the text of the tokens."""

    def problem(self, view: View) -> str | None:
        """See :class:`~hookattn.analyze.Measure`."""
        why = super().problem(view)
        if why is None and not all(isinstance(x, str) for row in self.tokens or () for x in row):
            return "it needs tokens as text, not as ids"
        return why


@dataclass(frozen=True)
class SameWord(WordPairs):
    """The weight on other occurrences of the query's own word, in whatever case; see :class:`PairMass`.

    Every piece of a word is related to every piece of the other occurrences. Punctuation and special tokens are no
    words.

    Args:
        across: only from one sentence to the other of a pair, which separators set apart.
    """

    name: ClassVar[str] = "same_word"
    across: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.flag("SameWord: across", self.across, MeasureError)

    def related(self, tokens: tuple[Any, ...]) -> Tensor:
        """See :class:`PairMass`."""
        return _same_word(tokens)

    def problem(self, view: View) -> str | None:
        """See :class:`~hookattn.analyze.Measure`."""
        found = super().problem(view) or (self._segments(view) if self.across else None)
        return found if isinstance(found, str) else None

    def places(self, view: View) -> list[Tensor]:
        """See :class:`PairMass`."""
        every = super().places(view)
        if not self.across:
            return every
        parts = (torch.tensor(row) for row in self._segments(view))
        return [pairs[:, part[pairs[0]] != part[pairs[1]]] for pairs, part in zip(every, parts, strict=True)]

    def _segments(self, view: View) -> Any:
        if self.tokens is None:
            return segments_of_keys(view)
        rows = key_labels(view, self.tokens)
        return rows if isinstance(rows, str) else [segment_of(row) for row in with_padding_marked(view, rows)]


@lru_cache(maxsize=32)
def _same_word(tokens: tuple[str, ...]) -> Tensor:
    words = split_words(tokens)
    numbers: dict[str, int] = {}
    text = [
        numbers.setdefault(text.casefold(), len(numbers)) if any(map(str.isalnum, text)) and not special else -1
        for text, special in zip(words.texts, words.special, strict=True)
    ]
    of = torch.tensor(words.of)
    ids = torch.tensor(text)[of]
    same = (ids.unsqueeze(1) == ids) & (ids >= 0) & (of.unsqueeze(1) != of)
    return same.nonzero().T


@dataclass(frozen=True)
class Brackets(WordPairs):
    """The weight of a closing bracket on the one that opens it, and the other way round; see :class:`PairMass`.

    Round, square, curly and angle brackets and directed quotation marks, nested as they have to be; one without its
    counterpart is related to nothing.

    Args:
        direction: ``"closing"`` (to opening), ``"opening"`` (to closing), or ``"both"``.
    """

    name: ClassVar[str] = "brackets"
    direction: str = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.word("Brackets: direction", self.direction, ("closing", "opening", "both"), MeasureError)

    def related(self, tokens: tuple[Any, ...]) -> Tensor:
        """See :class:`PairMass`."""
        closing = _brackets(tokens)
        opening = closing.flip(0)
        return {"closing": closing, "opening": opening, "both": torch.cat([closing, opening], 1)}[self.direction]


@lru_cache(maxsize=256)
def _brackets(tokens: tuple[str, ...]) -> Tensor:
    """2 P: the places of closing brackets, and of those that open them."""
    opened: list[tuple[str, int]] = []
    found: list[tuple[int, int]] = []
    for place, (token, piece) in enumerate(zip(tokens, split_words(tokens).pieces, strict=True)):
        for c in "" if is_special(token) else piece:
            if c in _BRACKETS.values():
                opened.append((c, place))
            # A bracket closes the nearest that fits it; what was opened in between and never closed is given up.
            elif c in _BRACKETS and any(o == _BRACKETS[c] for o, _ in opened):
                while opened[-1][0] != _BRACKETS[c]:
                    opened.pop()
                start = opened.pop()[1]
                if start != place:
                    found.append((place, start))
    return pair_tensor(found)
