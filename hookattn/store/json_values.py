"""What strict JSON can hold: no numbers that it has no word for, keys as strings, the rest by its repr."""

from __future__ import annotations

import math
from typing import Any

import torch


def json_value(x: Any) -> Any:
    """Data as dicts, lists and scalars that JSON has a word for."""
    if isinstance(x, dict):
        return {str(k): json_value(v) for k, v in x.items()}
    if isinstance(x, (list, tuple, set, frozenset)):
        return [json_value(v) for v in x]
    if x is None or isinstance(x, (bool, int, str)):
        return x
    if isinstance(x, float):
        return json_number(x)
    return str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else repr(x)


def json_number(x: Any) -> Any:
    """A number, or the name of one that is not finite."""
    return repr(x) if isinstance(x, float) and not math.isfinite(x) else x
