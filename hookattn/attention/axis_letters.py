"""The axes of q as it enters the dot product, said by a letter each: ``BTHD``, ``BHTD``, ``THD``."""

from __future__ import annotations

LETTERS = "BHTD"
"""Batch, heads, queries, width."""


def problem_of(letters: object) -> str | None:
    """Why letters do not name the axes of q; None: they do."""
    if not isinstance(letters, str):
        return f"{letters!r} is no string of letters"
    unknown = [x for x in letters if x not in LETTERS]
    if unknown:
        return f"{unknown[0]!r} is none of B (batch), H (heads), T (queries) and D (width)"
    twice = [x for x in letters if letters.count(x) > 1]
    if twice:
        return f"{twice[0]} is there twice, and q has each axis once"
    missing = [x for x in "TD" if x not in letters]
    return f"{missing[0]} is missing, which q has in any case" if missing else None
