"""Attention that rests on separators and punctuation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import checks
from ...errors import MeasureError
from ...tokens.pieces import SEPARATORS
from ...tokens.words import is_punctuation, split_words
from ..pairs import KeyMass


@dataclass(frozen=True)
class Separators(KeyMass):
    """The weight on separators such as ``[SEP]`` (Clark et al. 2019), see :class:`~hookattn.analyze.pairs.KeyMass`.

    Args:
        separators: the tokens that are.
        punctuation: whether what has nothing but punctuation in it is one too.
    """

    name: ClassVar[str] = "separators"
    separators: tuple[str, ...] = SEPARATORS
    punctuation: bool = False

    def __post_init__(self) -> None:
        given = (self.separators,) if isinstance(self.separators, str) else self.separators
        given = tuple(checks.several("Separators: separators", given, str, "tokens, as text", MeasureError))
        if not all(given):
            raise checks.wrong("Separators: separators", given, "tokens, none of them empty", MeasureError)
        object.__setattr__(self, "separators", given)
        checks.flag("Separators: punctuation", self.punctuation, MeasureError)

    def chosen(self, tokens: tuple[str, ...]) -> list[int]:
        """See :class:`~hookattn.analyze.pairs.KeyMass`."""
        marks = set(_marks(tokens)) if self.punctuation else set()
        return [i for i, token in enumerate(tokens) if token in self.separators or i in marks]


@dataclass(frozen=True)
class Punctuation(KeyMass):
    """The weight on punctuation and symbols, see :class:`~hookattn.analyze.pairs.KeyMass`."""

    name: ClassVar[str] = "punctuation"

    def chosen(self, tokens: tuple[str, ...]) -> list[int]:
        """See :class:`~hookattn.analyze.pairs.KeyMass`."""
        return _marks(tokens)


def _marks(tokens: tuple[str, ...]) -> list[int]:
    words = split_words(tokens)
    marks = [is_punctuation(text) for text in words.texts]
    return [i for i, word in enumerate(words.of) if marks[word]]
