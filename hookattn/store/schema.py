"""What kind of value the parts of a document have to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _each(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: type(x) is list and all(map(kind, x))


def _of(*types: type) -> Callable[[Any], bool]:
    return lambda x: type(x) in types  # not isinstance: True is an int too


_NUMBER: Callable[[Any], bool] = lambda x: type(x) in (int, float) or x in ("nan", "inf", "-inf")  # noqa: E731
_KINDS: dict[str, Callable[[Any], bool]] = {
    "bool": _of(bool),
    "int": _of(int),
    "str": _of(str),
    "object": _of(dict),
    "number": _NUMBER,
    "ints": _each(_of(int)),
    "strs": _each(_of(str)),
    "objects": _each(_of(dict)),
    "texts": _each(_each(_of(str))),
    "dtype": lambda x: type(x) is str and isinstance(getattr(torch, x, None), torch.dtype),
    "names": lambda x: type(x) is dict and all(type(n) in (str, type(None)) for n in x.values()),
    "scale": lambda x: _NUMBER(x) or (type(x) is dict and type(x.get("tensor")) is str),
}


def expect(where: str, entry: dict[str, Any], **kinds: str) -> None:
    """Check that an object of the document has these keys, of these kinds (``?``: or null). Raises TypeError."""
    for key, kind in kinds.items():
        if key not in entry:
            raise TypeError(f"{where} has no {key!r}")
        x = entry[key]
        if not (_KINDS[kind.removesuffix("?")](x) or (x is None and kind.endswith("?"))):
            raise TypeError(f"{where}: {key!r} is {repr(x)[:60]}, expected {kind.replace('?', ' or null')}")
