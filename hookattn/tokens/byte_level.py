"""The characters in which byte-level BPE writes bytes."""

from __future__ import annotations

from collections.abc import Sequence


def _alphabet() -> dict[str, int]:
    """The character for each byte: printable Latin-1 is itself, the others follow 255."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(0x100 + i): b for i, b in enumerate(others)}}


_ALPHABET = _alphabet()


def in_bytes(token: str) -> bytes:
    """The bytes that a token stands for; one that is not in the alphabet was added, and is written as it is."""
    return bytes(_ALPHABET[c] for c in token) if _in_alphabet(token) else token.encode(errors="surrogatepass")


def is_byte_level(tokens: Sequence[str]) -> bool:
    """Whether they are bytes: in the alphabet of bytes, and UTF-8 in it, but for a character cut off at either end.

    Where words begin with its sign for a space, a few may be something else: what was added to the vocabulary is
    written as it is (runs of spaces, say), and a model may write bytes that are no text.

    Args:
        tokens: of one sequence, without the special ones.
    """
    written = [t for t in tokens if _in_alphabet(t)]
    whole = b"".join(map(in_bytes, written))
    start = next((i for i, b in enumerate(whole) if b & 0xC0 != 0x80), len(whole))
    text = whole[start:].decode(errors="replace")
    broken = text.removesuffix("\ufffd").count("\ufffd")
    others = len(tokens) - len(written)
    # A few exceptions in a text with Ġ are what the docstring names. A quarter and more is another tokenizer's text,
    # whose letters are in the alphabet by chance.
    if (broken or others) and (4 * (broken + others) > len(tokens) or not any(t.startswith("Ġ") for t in written)):
        return False
    # Pure ASCII without a character above U+00FF would read the same either way, and is no evidence.
    return not text.isascii() or any(c > "\xff" for t in written for c in t)


def _in_alphabet(token: str) -> bool:
    return all(c in _ALPHABET for c in token)
