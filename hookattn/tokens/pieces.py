"""What each token of a sequence stands for: special tokens, and the marks that tokenizers write into pieces of words.

A trace holds the tokens and no tokenizer, so the form of a token decides whether it is special. Tokenizers put the name
of a special token in brackets that their text does not have around one piece:

==========================  ===================================================================================
``<|endoftext|>``           pipes, ASCII or full-width, around anything (``<|fim middle|>``, ``<｜User｜>``)
``<s>``, ``</s>``           a name: ASCII letters and digits, with at least one letter, and ``_ - . : /`` between
                            them (``<extra_id_0>``, ``<2en>``, ``<sep/>``); a pipe may be on one side (``<|turn>``)
``[CLS]``                   a name of at least two capitals and digits, and ``_`` or ``-`` between them (``[/INST]``)
``>>fra<<``                 a name, between double angles
==========================  ===================================================================================

Beside these there are a few by name, whose form is that of text otherwise (``[unused5]``, ``[gMASK]``, ``|SPEAKER|``).
So ``[...]``, ``[1]``, ``[not]``, ``<3>`` and ``<+>`` are text. So is the HTML that formats text (``<b>``, ``</td>``),
which some vocabularies have in one piece; ``<s>`` is none of it, as it begins a sequence. Special tokens without
brackets, such as the language code ``en_XX``, have the form of words and are taken for words. Who has the tokenizer
gives its word ids instead, in which None is a special token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from .byte_level import in_bytes, is_byte_level

SEPARATORS = (
    "[SEP]", "</s>", "<sep>", "<|sep|>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>",
    "<end_of_turn>", "<|end|>",
)  # fmt: skip
"""Tokens that end a text or part two, in the spelling of the common tokenizers."""

_NAME = r"(?=[^<>]*[A-Za-z])(?:[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?)(?:[.:/][A-Za-z0-9_-]*[A-Za-z0-9_])*"
# The viewer has the same expressions in src/tokens.ts; tests/tokens/cases.json is held against both.
_SPECIAL = re.compile(
    # SentencePiece writes the space of the text in front of some: ▁<PRE>.
    r"▁?(?:"
    r"<[|｜][^<>|｜]*[^<>|｜ ][^<>|｜]*[|｜]>"
    rf"|<\|?/?{_NAME}/?\|?>"
    r"|\[/?[A-Z](?:[_-]?[A-Z0-9])+\]"
    rf"|>>{_NAME}<<"
    r"|\[(?:unused[0-9]+|control_[0-9]+|[gs]MASK|@BOS@)\]"
    r"|\|(?:ENDOFTEXT|SPEAKER|NEWLINE)\||\|\|\|(?:IP_ADDRESS|EMAIL_ADDRESS|PHONE_NUMBER)\|\|\|"
    r")"
)
_MARKUP = re.compile(
    r"▁?</?(?:a|b|blockquote|br|caption|code|div|em|h[1-6]|hr|i|li|ol|p|pre|span|strong|su[bp]|table|tbody|td|tfoot|th|"
    r"thead|tr|u|ul)/?>"
)
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_END = "</w>"


class Marks(Enum):
    """How a tokenizer marks where words begin."""

    BYTES = "bytes"
    """``Ġcat``: bytes, each written as one character; a space begins a word."""
    METASPACE = "metaspace"
    """``▁cat``: ▁ is a space, which begins a word; ``<0xE2>`` is a byte."""
    CONTINUATION = "continuation"
    """``##ing`` goes on with a word."""
    WORD_END = "word_end"
    """``cat</w>`` ends a word."""
    SPACE = "space"
    """Text as it is, in which a space begins a word."""
    JOINER = "joiner"
    """``wor@@``: the next piece goes on with the word."""
    NONE = "none"
    """Nothing is marked: each token is a word."""


class Piece(NamedTuple):
    """What one token stands for.

    Attributes:
        data: its text in UTF-8, without the tokenizer's marks; a space in front that the tokenizer wrote is part of it.
            It may begin or end inside a character. A special token is as it was.
        special: whether it is a special token such as ``[SEP]`` or ``<s>``.
        joins: whether it goes on with the word of the token before.
    """

    data: bytes
    special: bool
    joins: bool


def is_special(token: str) -> bool:
    """Whether a token is written as special ones are: ``[SEP]``, ``</s>``, ``<|endoftext|>``."""
    # Most tokens do not end as a special one does, and to ask that first is cheaper than the expression.
    if not token.endswith((">", "]", "<", "|")) or _SPECIAL.fullmatch(token) is None:
        return False
    return token != _END and _BYTE.fullmatch(token) is None and _MARKUP.fullmatch(token) is None


def marks_of(tokens: Sequence[str]) -> Marks:
    """How the tokenizer marked words that wrote these tokens.

    Args:
        tokens: of one sequence, as the tokenizer's ``convert_ids_to_tokens`` gives them, or plain text.
    """
    return _marks_of([token for token in tokens if not is_special(token)])


def read_pieces(tokens: Sequence[str]) -> list[Piece]:
    """What each token of a sequence stands for; how one is written depends on its neighbours.

    Args:
        tokens: S, as the tokenizer's ``convert_ids_to_tokens`` gives them, or plain text.

    Returns:
        S pieces.
    """
    # The marks are those of the text: names of special tokens have an alphabet of their own, and would mislead.
    special = [is_special(token) for token in tokens]
    marks = _marks_of([token for token, own in zip(tokens, special, strict=True) if not own])
    made: list[Piece] = []
    for i, (token, own) in enumerate(zip(tokens, special, strict=True)):
        if own:
            made.append(Piece(_utf8(token), True, False))
            continue
        first = i == 0 or special[i - 1]
        data = _piece_data(token, marks)
        made.append(Piece(data, False, not first and _joins(tokens[i - 1], token, data, marks)))
    return made


def _marks_of(ordinary: Sequence[str]) -> Marks:
    """The marks of tokens among which no special one is."""
    if is_byte_level(ordinary):
        return Marks.BYTES
    if any("▁" in t for t in ordinary):  # before ##, which SentencePiece has of headings
        return Marks.METASPACE
    if any(map(_has_continuation_mark, ordinary)):
        return Marks.CONTINUATION
    if any(t.endswith(_END) for t in ordinary):
        return Marks.WORD_END
    if any(t.startswith(" ") and len(t) > 1 for t in ordinary):  # before @@, which a diff has
        return Marks.SPACE
    return Marks.JOINER if any(map(_has_joiner, ordinary)) else Marks.NONE


def _piece_data(token: str, marks: Marks) -> bytes:
    if marks is Marks.BYTES:
        return in_bytes(token)
    byte = _BYTE.fullmatch(token) if token.startswith("<0x") else None
    if byte:
        return bytes([int(byte[1], 16)])
    if marks is Marks.METASPACE:
        token = token.replace("▁", " ")
    elif marks is Marks.CONTINUATION and _has_continuation_mark(token):
        token = token[2:]
    elif marks is Marks.WORD_END:
        token = token.removesuffix(_END)
    elif marks is Marks.JOINER and _has_joiner(token):
        token = token[:-2]
    return _utf8(token)


def _joins(before: str, token: str, data: bytes, marks: Marks) -> bool:
    if marks is Marks.CONTINUATION:
        return _has_continuation_mark(token)
    if marks is Marks.WORD_END:
        return not before.endswith(_END)
    if marks is Marks.JOINER:
        return _has_joiner(before)
    return marks is not Marks.NONE and not data.startswith((b" ", b"\n"))


def _has_continuation_mark(token: str) -> bool:
    return token.startswith("##") and len(token) > 2


def _has_joiner(token: str) -> bool:
    return token.endswith("@@") and len(token) > 2


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
