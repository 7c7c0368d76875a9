"""Plain data of what users hold: numbers and arrays of any library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RenderError


def json_value(value: Any, where: str) -> Any:
    """Strict JSON of mappings, sequences, arrays, tensors and scalars; a number that is not finite becomes None.

    Raises:
        RenderError: something JSON has no form for.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): json_value(v, f"{where}[{k!r}]") for k, v in value.items()}
    if callable(getattr(value, "tolist", None)):  # numpy, torch, pandas
        return json_value(value.tolist(), where)
    if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (bytes, bytearray)):
        return [json_value(v, f"{where}[{i}]") for i, v in enumerate(value)]
    raise RenderError(f"{where}: JSON has no form for {type(value).__name__}; convert it to lists, numbers or text.")
