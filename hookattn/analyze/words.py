"""The words that a tokenizer's pieces make up.

A piece begins a word where its tokenizer says so (``Ġcat``, ``▁the``, a space in front, no ``##``, no ``</w>`` before
it); beside that punctuation, a line break and an ideograph are words of their own, as BERT's tokenizer has it, so that
``Ġcat`` and ``,`` are two. Where no piece is marked, each is a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..byte_level import in_bytes, is_byte_level
from ..errors import MeasureError

_SPECIAL = re.compile(r"<(?!0x[0-9A-Fa-f]{2}>)[^\s<>]+>|\[[^\[\]\s]+\]")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


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
    pieces, joined = _pieces(tokens)
    pieces = _healed(pieces)
    ids: list[Hashable] = []
    before: str | None = None
    word = -1
    for token, piece, joins in zip(tokens, pieces, joined, strict=True):
        special = is_special(token)
        if piece:
            word += not joins or special or before is None or _apart(before, piece)
            before = None if special else piece
        ids.append(None if special else word)
    return _words(tokens, pieces, ids)


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
    return _words(tokens, _healed(_pieces(tokens)[0]), ids)


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


def is_special(token: str) -> bool:
    """Whether a token is written as special ones are: ``[SEP]``, ``</s>``, ``<|endoftext|>``."""
    return _SPECIAL.fullmatch(token) is not None


def _healed(pieces: Sequence[str]) -> list[str]:
    """With the characters put together that a tokenizer took to pieces."""
    made: list[str] = []
    first = 0
    for i, piece in enumerate(pieces):
        if i and _cut(made[first][-1:]) and _cut(piece[:1]):
            made[first] = _text((made[first] + piece).encode(errors="surrogateescape"))
            made.append("")
        else:
            first = i
            made.append(piece)
    return [piece.encode(errors="replace").decode() for piece in made]


def _cut(c: str) -> bool:
    """Whether it is a byte of a character that is not whole."""
    return "\udc80" <= c <= "\udcff"


def _apart(before: str, piece: str) -> bool:
    """Whether two neighbouring pieces are two words, whatever the tokenizer marks."""
    if any(is_punctuation(x) or "\n" in x for x in (before, piece)):
        return True
    return any(unicodedata.east_asian_width(c) == "W" for c in (before[-1:], piece[:1]) if c)


def _pieces(tokens: Sequence[str]) -> tuple[list[str], list[bool]]:
    """The text of each token, and whether it goes on with the word of the one before."""
    ordinary = [t for t in tokens if not _SPECIAL.fullmatch(t)]
    if is_byte_level(ordinary):
        made = [t if _SPECIAL.fullmatch(t) else _text(in_bytes(t)) for t in tokens]
        return made, [not t.startswith((" ", "\n")) for t in made]
    if any("▁" in t for t in ordinary):
        made = [_text(bytes([int(b[1], 16)])) if (b := _BYTE.fullmatch(t)) else t for t in tokens]
        made = [t.replace("▁", " ") for t in made]
        return made, [not t.startswith(" ") for t in made]
    if any(t.startswith("##") and len(t) > 2 for t in ordinary):
        joins = [t.startswith("##") and len(t) > 2 for t in tokens]
        return [t[2:] if j else t for t, j in zip(tokens, joins, strict=True)], joins
    if any(t.endswith("</w>") for t in ordinary):
        joins = [False, *(not t.endswith("</w>") for t in tokens[:-1])]
        return [t.removesuffix("</w>") for t in tokens], joins
    if any(t.startswith(" ") and len(t) > 1 for t in ordinary):
        return list(tokens), [not t.startswith((" ", "\n")) for t in tokens]
    return list(tokens), [False] * len(tokens)


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")
