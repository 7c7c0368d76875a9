"""Checks of parameters."""

from __future__ import annotations

from ..errors import SelectionError


def check_count(of: str, name: str, value: object) -> None:
    """Raise a SelectionError unless a parameter is a positive int."""
    if type(value) is not int or value < 1:
        raise SelectionError(f"{of}({name}={value!r}): expected an int from 1.")
