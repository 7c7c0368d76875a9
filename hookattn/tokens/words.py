"""The words that a tokenizer's pieces make up.

A piece begins a word where its tokenizer says so (see :mod:`hookattn.tokens.pieces`); beside that punctuation, a line
break and an ideograph are words of their own, as word-piece tokenizers have it, so that ``Ġcat`` and ``,`` are two.
Where no piece is marked, each is a word.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..errors import MeasureError
from .pieces import Piece, read_pieces


@dataclass(frozen=True, slots=True)
class Words:
    """The words of one sequence.

    Attributes:
        of: S, for each token the number of its word, which go up from 0.
        texts: of each word, without the tokenizer's marks and the space in front; a special token is as it was.
        special: of each word, whether it is a special token such as ``[SEP]`` or ``<s>``.
        pieces: S, the text of each token, a space in front included; a character that several share is in the first.
    """

    of: tuple[int, ...]
    texts: tuple[str, ...]
    special: tuple[bool, ...]
    pieces: tuple[str, ...]

    def tokens(self) -> list[list[int]]:
        """The tokens of each word."""
        made: list[list[int]] = [[] for _ in self.texts]
        for token, word in enumerate(self.of):
            made[word].append(token)
        return made

    def ordinary(self) -> list[int]:
        """The words that are no special tokens."""
        return [word for word, special in enumerate(self.special) if not special]


@lru_cache(maxsize=256)
def split_words(tokens: tuple[str, ...]) -> Words:
    """The words of a sequence of tokens, as the tokenizer's ``convert_ids_to_tokens`` gives them, or of plain text.

    Args:
        tokens: S.
    """
    pieces = read_pieces(tokens)
    texts = _whole_texts(pieces)
    ids: list[Hashable] = []
    before: str | None = None
    word = -1
    for piece, text in zip(pieces, texts, strict=True):
        if text:
            word += not piece.joins or before is None or _are_two_words(before, text)
            before = None if piece.special else text
        ids.append(None if piece.special else word)
    return _words(tokens, texts, ids)


def given_words(tokens: Sequence[str] | None, ids: Sequence[Hashable]) -> Words:
    """The words that neighbours with one id make up, as ``BatchEncoding.word_ids()`` has it.

    Args:
        tokens: S; None: the words are named by their ids.
        ids: S; None is a special token.

    Raises:
        MeasureError: there are not as many ids as tokens.
    """
    if tokens is None:
        tokens = ["" if i is None or (n and i == ids[n - 1]) else str(i) for n, i in enumerate(ids)]
        return _words(tokens, tokens, ids)
    if len(ids) != len(tokens):
        raise MeasureError(f"words: expected an id for each of the {len(tokens)} tokens, got {len(ids)}.")
    return _words(tokens, _whole_texts(read_pieces(tokens)), ids)


def _words(tokens: Sequence[str], pieces: Sequence[str], ids: Sequence[Hashable]) -> Words:
    of: list[int] = []
    texts: list[str] = []
    special: list[bool] = []
    for i, name in enumerate(ids):
        if i == 0 or name is None or name != ids[i - 1]:
            texts.append("")
            special.append(name is None)
        of.append(len(texts) - 1)
        texts[-1] += tokens[i] if name is None else pieces[i]
    clean = [text if own else text.strip(" ") for text, own in zip(texts, special, strict=True)]
    return Words(tuple(of), tuple(clean), tuple(special), tuple(pieces))


def is_punctuation(text: str) -> bool:
    """Whether there is nothing in it but punctuation and symbols."""
    bare = text.strip()
    return bool(bare) and all(unicodedata.category(c)[0] in "PS" for c in bare)


def _whole_texts(pieces: Sequence[Piece]) -> list[str]:
    """The text of each piece, with the characters put together that a tokenizer took to pieces."""
    # After decoding, a byte that is no whole character is a lone surrogate. Neighbours of such are joined and decoded
    # anew, into the first of them.
    made: list[str] = []
    first = 0
    for i, piece in enumerate(pieces):
        text = _decoded(piece.data)
        if i and _is_broken_byte(made[first][-1:]) and _is_broken_byte(text[:1]):
            made[first] = _decoded((made[first] + text).encode(errors="surrogateescape"))
            made.append("")
        else:
            first = i
            made.append(text)
    return [text.encode(errors="replace").decode() for text in made]


def _is_broken_byte(c: str) -> bool:
    """Whether it is a byte of a character that is not whole."""
    return "\udc80" <= c <= "\udcff"


def _are_two_words(before: str, piece: str) -> bool:
    """Whether two neighbouring pieces are two words, whatever the tokenizer marks."""
    if any(is_punctuation(x) or "\n" in x for x in (before, piece)):
        return True
    return any(unicodedata.east_asian_width(c) == "W" for c in (before[-1:], piece[:1]) if c)


def _decoded(data: bytes) -> str:
    return data.decode(errors="surrogateescape")
