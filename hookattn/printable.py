"""Text of any origin, as a terminal, a table or a page may get it: what has no shape is written as its number.

A trace file, a model and a tokenizer hold strings that somebody else wrote. Written as they are, an escape sequence of
theirs moves the cursor, hides lines or fills the clipboard, and a mark of direction makes a name read as another. Here
is the one rule of what is written as it is: letters, marks, digits, signs, spaces and emoji of all scripts are.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

# Letters and marks that have no shape: fillers of Hangul, the joiner of graphemes, Khmer's inherent vowels, the
# separator of Mongolian vowels, and its variation selectors.
_SHAPELESS = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x3164, 0xFFA0}
# Signs of Arabic, Syriac and Kaithi that stand in front of a number. They count as format characters, and have a shape.
_SIGNS = {*range(0x0600, 0x0606), 0x06DD, 0x070F, 0x0890, 0x0891, 0x08E2, 0x110BD, 0x110CD}
_JOINERS = {0x200C, 0x200D}
_SELECTORS = {*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}
_FAST = re.compile(r"[ -~]*")


def printable(text: str, keep: str = "") -> str:
    r"""The text with ``\x1b``, ``\u202e`` or ``\U000e0041`` for each character that has no shape of its own.

    That are controls (C0, C1, delete, and breaks of lines and paragraphs), format characters that hide text or change
    its direction, lone surrogates, and what Unicode has not assigned. Written a second time, it stays the same.

    Args:
        text: any text.
        keep: characters that are written as they are in any case: a line break, where the text may have lines.
    """
    return _written(text, keep, _escape)


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something; the error's kind where none does."""
    return next((" ".join(line.split()) for line in str(error).splitlines() if line.strip()), type(error).__name__)


def json_text(data: Any) -> str:
    """Plain data as JSON over several lines; in its strings, too, only what is printable is written as it is.

    Raises:
        ValueError, TypeError: JSON has no form for it.
    """
    # Outside of its strings JSON is ASCII, so that an escape of JSON is right wherever there is something to escape.
    return _written(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False), "\n", _json_escape)


def _written(text: str, keep: str, escape: Any) -> str:
    if _FAST.fullmatch(text):
        return text
    made = [c if c in keep or _has_shape(text, i) else escape(c) for i, c in enumerate(text)]
    return "".join(made)


def _has_shape(text: str, i: int) -> bool:
    c = text[i]
    code = ord(c)
    if code < 0x7F:
        return code >= 0x20
    if code in _SELECTORS:
        # One of them chooses between two shapes of what is before it; more of them hide bytes.
        return i > 0 and ord(text[i - 1]) not in _SELECTORS and (text[i - 1] in "#*0123456789©®" or _joins(text[i - 1]))
    if code in _JOINERS:
        # Between the letters of some scripts, and between emoji, they choose a shape; in a Latin name they are hidden.
        return 0 < i < len(text) - 1 and _joins(text[i - 1]) and _joins(text[i + 1])
    if code in _SIGNS:
        return True
    return code not in _SHAPELESS and unicodedata.category(c) not in ("Cc", "Cf", "Cn", "Cs", "Zl", "Zp")


def _joins(c: str) -> bool:
    """Whether a character is one that joiners and selectors are made for: a letter, mark or sign beyond Latin."""
    return ord(c) > 0x2AF and unicodedata.category(c)[0] in "LMS" and ord(c) not in _SHAPELESS


def _escape(c: str) -> str:
    code = ord(c)
    short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(c)
    if short is not None:
        return short
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escape(c: str) -> str:
    return json.dumps(c)[1:-1] if c != "\x7f" else "\\u007f"
