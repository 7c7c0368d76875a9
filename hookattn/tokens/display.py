"""How a token is shown to a person: what a tokenizer writes for spaces, bytes and word pieces, as text again.

``Ġcat``, ``▁cat`` and ``cat</w>`` are shown as "cat", ``##ing`` and any other piece that continues a word as "…ing". A
space is shown as ␣ where it is not the one that every word begins with. A character that a tokenizer took to pieces is
shown in each of them, as "€ 1/3". What has no shape (controls, marks that reverse the text) has a visible stand-in.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from .pieces import Piece, read_pieces

CONTINUES = "…"
_STAND_IN = {"\n": "↵", "\t": "⇥", "\r": "␍", "\x7f": "␡"}


def shown(tokens: Sequence[str]) -> list[str]:
    """Labels of the tokens of one sequence, in its order: how a token is written depends on its neighbours.

    Args:
        tokens: as the tokenizer's ``convert_ids_to_tokens`` gives them, or plain text.

    Returns:
        One label a token; never empty, and without anything that breaks a line or changes the direction of the text
        around it.
    """
    pieces = read_pieces(tokens)
    labels: list[str] = []
    before = ""
    for piece, (text, part) in zip(pieces, _piece_texts(pieces), strict=True):
        if piece.special:
            labels.append(visible(text.removeprefix("▁")))
            before = ""
            continue
        # The space that every word begins with is left out. Any other is part of the text and is shown: after a line
        # break, say, or the second of two.
        bare = text[1:] if text[:1] == " " and text[1:2].isalnum() and not before[-1:].isspace() else text
        joins = piece.joins and _spells(before[-1:]) and _spells(text[:1]) and not part
        labels.append((CONTINUES if joins else "") + (visible(bare) or "∅") + part)
        before = text
    return labels


def visible(text: str, spaces: str = "␣") -> str:
    """Text with a visible stand-in for every character that has no shape of its own.

    Args:
        text: any text.
        spaces: what stands for a space at either end; one between words stays as it is.
    """
    first, last = len(text) - len(text.lstrip(" ")), len(text.rstrip(" "))
    made = "".join(
        (" " if first <= i < last else spaces) if c == " " else _visible_character(c) for i, c in enumerate(text)
    )
    return "◌" + made if made and unicodedata.combining(made[0]) else made


def shortened(label: str, length: int) -> str:
    """A label of at most ``length`` characters (at least 2), its end left out if need be."""
    if len(label) <= length:
        return label
    end = length - 1
    while end > 1 and unicodedata.combining(label[end]):
        end -= 1
    return label[:end] + CONTINUES


def _visible_character(c: str) -> str:
    if c in _STAND_IN:
        return _STAND_IN[c]
    if c < " ":
        return chr(0x2400 + ord(c))
    kind = unicodedata.category(c)
    if kind == "Zs":
        return "␣"
    return f"U+{ord(c):04X}" if kind[0] == "C" or kind in ("Zl", "Zp") else c


def _spells(c: str) -> bool:
    """Whether a character is part of a word in a script that sets words apart."""
    return c.isalnum() and unicodedata.east_asian_width(c) not in "WF"


def _piece_texts(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Each piece's text, with a character that several share in each of them, and which part of it that is."""
    owners = [i for i, piece in enumerate(pieces) for _ in piece.data]
    data = b"".join(piece.data for piece in pieces)
    made = [("", "")] * len(pieces)
    at = 0
    while at < len(data):
        text, size = _character(data, at)
        sharing = list(dict.fromkeys(owners[at : at + size]))
        for n, i in enumerate(sharing, 1):
            before = made[i]
            made[i] = before[0] + text, before[1] if len(sharing) == 1 else f" {n}/{len(sharing)}"
        at += size
    return made


def _character(data: bytes, at: int) -> tuple[str, int]:
    """The character at a byte, and how many bytes it takes; one that is no UTF-8 is shown as a number."""
    size = next((n for n, top in ((1, 0x80), (2, 0xE0), (3, 0xF0), (4, 0xF8)) if data[at] < top), 1)
    try:
        return data[at : at + size].decode(errors="surrogatepass"), size
    except UnicodeDecodeError:
        return f"<{data[at]:02X}>", 1
