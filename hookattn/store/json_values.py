"""What strict JSON can hold: no numbers that it has no word for, keys as strings, the rest by its repr."""

from __future__ import annotations

import math
from typing import Any

import torch

DEEPEST = 100
"""So many levels of objects and lists in one another are written and read: Python's own functions bear no thousand."""


def json_value(x: Any, room: int = DEEPEST) -> Any:
    """Data as dicts, lists and scalars that JSON has a word for; what is nested deeper than ``room`` is a word."""
    if isinstance(x, (dict, list, tuple, set, frozenset)):
        if room == 0:
            return f"<{type(x).__name__}, nested deeper than {DEEPEST} levels>"
        if isinstance(x, dict):
            return {str(k): json_value(v, room - 1) for k, v in x.items()}
        return [json_value(v, room - 1) for v in x]
    if x is None or isinstance(x, (bool, int, str)):
        return x
    if isinstance(x, float):
        return json_number(x)
    return str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else repr(x)


def json_number(x: Any) -> Any:
    """A number, or the name of one that is not finite."""
    return repr(x) if isinstance(x, float) and not math.isfinite(x) else x


def nesting(x: Any) -> int:
    """How many levels of objects and lists are in one another, counted up to one more than :data:`DEEPEST`."""
    deepest, level = 0, [x]
    while level and deepest <= DEEPEST:
        level = [v for c in level if type(c) in (dict, list) for v in (c.values() if type(c) is dict else c)]
        deepest += bool(level)
    return deepest
