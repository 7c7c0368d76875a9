"""Attention from an acronym to the words that it stands for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor

from ...tokens.words import split_words
from .lexical import WordPairs, piece_pairs

_ACRONYM = re.compile(r"(?=(?:.*[A-Z]){2})[A-Z][A-Za-z]{0,6}[A-Z]s?|(?:[A-Z]\.){2,}")
_SMALL = frozenset("a an and at by de for from in la of on or the to und with".split())


@dataclass(frozen=True)
class Acronyms(WordPairs):
    """The weight of an acronym on the words that it stands for; see :class:`PairMass`.

    An acronym is a word such as "IBM", "U.S." or "PhD". It stands for any run of words elsewhere in the text whose
    initials spell it in order, where one may leave out function words ("DoD": Department of Defense).
    """

    name: ClassVar[str] = "acronyms"

    def related(self, tokens: tuple[Any, ...]) -> Tensor:
        """See :class:`PairMass`."""
        return _acronyms(tokens)


@lru_cache(maxsize=256)
def _acronyms(tokens: tuple[str, ...]) -> Tensor:
    words = split_words(tokens)
    texts = ["" if special else text for text, special in zip(words.texts, words.special, strict=True)]
    short: list[tuple[int, int, str]] = []
    at = 0
    while at < len(texts):
        stop, letters = _acronym(texts, at)
        if letters:
            short.append((at, stop, letters))
        at = max(stop, at + 1)
    found: list[tuple[int, int]] = []
    for start, stop, letters in short:
        for run in _spelled(texts, letters):
            if not set(run) & set(range(start, stop)):
                found += [(a, b) for a in range(start, stop) for b in run]
    return piece_pairs(words, found)


def _acronym(texts: list[str], at: int) -> tuple[int, str]:
    """Where the acronym that begins at a word ends, and its letters; none: no letters."""
    dotted = at
    while dotted + 1 < len(texts) and re.fullmatch(r"[A-Z]", texts[dotted]) and texts[dotted + 1] == ".":
        dotted += 2
    if dotted - at >= 4:
        return dotted, "".join(texts[at:dotted:2])
    if _ACRONYM.fullmatch(texts[at]):
        return at + 1, texts[at].replace(".", "").removesuffix("s")
    return at + 1, ""


def _spelled(texts: list[str], letters: str) -> list[list[int]]:
    """Every run of words whose initials are these letters, in order."""
    runs = (_run(texts, at, letters.casefold()) for at in range(len(texts)) if texts[at].casefold() not in _SMALL)
    return [run for run in runs if run]


def _run(texts: list[str], at: int, letters: str) -> list[int]:
    """The words from ``at`` on that spell it, without function words where that goes; none: they don't."""
    # A function word may be left out or spell a letter, so that both are tried, leaving it out first.
    text = texts[at].casefold() if at < len(texts) else ""
    if text in _SMALL or text == "-":
        without = _run(texts, at + 1, letters)
        if without:
            return without
    if len(text) < 2 or text[0] != letters[0]:
        return []
    if len(letters) == 1:
        return [at]
    rest = _run(texts, at + 1, letters[1:])
    return [at, *rest] if rest else []
