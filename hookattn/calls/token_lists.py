"""Token strings as they may be given: one list, one for each batch entry, or such lists for each stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import checks
from ..errors import InputError


def token_lists(tokens: Sequence[Any] | None) -> list[list[str]] | None:
    """Token strings as a list for each batch entry, from one list or several.

    Raises:
        InputError: these are no lists of strings.
    """
    if tokens is None:
        return None
    items = checks.ordered_items(tokens)
    alone = bool(items) and all(isinstance(x, str) for x in items or ())
    rows = [items] if alone else [checks.ordered_items(x) for x in items or ()]
    if any(rows) and all(row is not None and all(isinstance(x, str) for x in row) for row in rows):
        return [list(row) for row in rows if row is not None]
    raise InputError(
        "tokens has to be a list of strings, one for each position, or one such list for each batch "
        f"entry; got {checks.printed(tokens)}."
    )


def are_token_lists(tokens: Any) -> bool:
    """Whether it is in the form that a trace keeps: None, or a list of lists of strings, be they empty."""
    return tokens is None or (
        type(tokens) is list and all(type(row) is list and all(type(x) is str for x in row) for row in tokens)
    )


# The stacks whose text a trace's tokens are of, as calls/key_tokens.py has it: what is given for one of them is both.
_FIRST = ("encoder", "text", "main")


def stacked_tokens(tokens: Any) -> tuple[list[list[str]] | None, dict[str, list[list[str]]]]:
    """The tokens of a trace, and those of single stacks.

    Args:
        tokens: as in :func:`token_lists`, or such lists by the name of the stack whose sequence they are.

    Raises:
        InputError: these are no lists of strings.
    """
    if not isinstance(tokens, Mapping):
        return token_lists(tokens), {}
    wrong = [name for name in tokens if not isinstance(name, str)]
    if wrong:
        raise InputError(f"tokens: expected the names of stacks, such as 'encoder' and 'decoder'; got {wrong[0]!r}.")
    named = {name: lists for name, of in tokens.items() if (lists := token_lists(of)) is not None}
    return next((named[name] for name in _FIRST if name in named), None), named
