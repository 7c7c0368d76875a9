"""What an argument of a public function may be, each rule once: a flag, a number, one of some words, a path, …

A function is given the name of the argument and its value, and gives the value back; or it says which argument it is,
what was expected and what was got. Something of another kind is an :class:`~hookattn.errors.InputError`, and a value
that is none there is a :class:`~hookattn.errors.SelectionError`, unless the caller's own error is the better name.

Checks are made once, where a call comes in. What is right is told by one ``isinstance``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from os import PathLike, fspath
from typing import Any, TypeVar

from .errors import HookattnError, InputError, SelectionError

Error = type[HookattnError]
Kind = TypeVar("Kind")

LARGEST = 2**31 - 1
"""No axis is longer, and no position or distance larger."""
# So much of a value is printed.
_LONGEST = 60


def printed(value: object) -> str:
    """A value as an error shows it: its ``repr``, cut where it is long; its class, where it has none."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - an error is being told already
        text = f"an object of {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def wrong(name: str, value: object, expected: str, error: Error = InputError) -> HookattnError:
    """The error that says it; to be raised."""
    shown, kind = printed(value), type(value).__name__
    plain = value is None or isinstance(value, (bool, int, float, str, bytes, list, tuple, dict, slice))
    return error(f"{name}={shown}: expected {expected}" + ("." if plain else f"; got {kind}."))


def flag(name: str, value: object, error: Error = InputError) -> bool:
    """True or False; nothing that merely counts as one, as ``"no"`` counts as True."""
    if value is True or value is False:
        return value
    if type(value).__name__ in ("bool_", "bool") and getattr(value, "shape", None) == ():  # numpy's
        return bool(value)
    raise wrong(name, value, "True or False", error)


def whole(name: str, value: Any, least: int = -LARGEST, what: str | None = None, error: Error = SelectionError) -> int:
    """An int, of any library, from ``least`` on and no larger than any extent; no bool.

    Args:
        name, value: the argument.
        least: the smallest that it may be.
        what: how it is called, if it is more than an int.
        error: that is raised.
    """
    what = what or ("an int" if least == -LARGEST else f"an int from {least}")
    found = value if type(value) is int else index(name, value, what, error)
    if not least <= found <= LARGEST:
        raise wrong(name, value, what if found < least else f"{what} to {LARGEST}", error)
    return found


def index(name: str, value: Any, what: str = "an int", error: Error = SelectionError) -> int:
    """An int of any library, however large; no bool."""
    if not _is_bool(value):
        try:
            return operator.index(value)
        except Exception:  # noqa: BLE001 - a tensor of several numbers has an index that fails
            pass
    raise wrong(name, value, what, error) from None


def several_ints(
    name: str, value: Any, what: str = "an int or several ints", error: Error = SelectionError
) -> list[int]:
    """One int, or several: of a list, a range, an array, a tensor, a generator; in their order, none left out."""
    if type(value) is int:
        return [value]
    if callable(getattr(value, "tolist", None)):  # of torch, numpy, pandas
        try:
            value = value.tolist()
        except Exception:  # noqa: BLE001 - a tensor that is sparse, or has no values
            raise wrong(name, value, what, error) from None
    items = None if isinstance(value, Mapping) else items_of(value)
    if items is None:
        return [index(name, value, what, error)]
    for item in items:
        if type(item) is not int:
            index(name, item, what, error)
    return [operator.index(item) for item in items]


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def int_slice(name: str, value: slice, error: Error = SelectionError) -> slice:
    """A slice of ints that goes somewhere."""
    for part in (value.start, value.stop, value.step):
        if part is not None:
            index(name, part, "a slice of ints", error)
    if value.step is not None and operator.index(value.step) == 0:
        raise wrong(name, value, "a slice whose step is not 0", error)
    return value


def number(name: str, value: Any, what: str, fits: Callable[[float], bool], error: Error = SelectionError) -> float:
    """A number that is no NaN, and for which ``fits`` holds.

    Args:
        name, value: the argument.
        what: is expected, in words.
        fits: whether it is in its range.
        error: that is raised.
    """
    found = math.nan
    # Of numpy or torch it has to be a number, and no array of one.
    if not isinstance(value, (str, bytes)) and not _is_bool(value) and not getattr(value, "ndim", 0):
        try:
            found = float(value)
        except Exception:  # noqa: BLE001 - whatever it is, it is no number
            found = math.nan
    if math.isnan(found) or not fits(found):
        raise wrong(name, value, what, error)
    return found


def amount(name: str, value: Any, what: str = "a number", error: Error = InputError) -> float:
    """A real number of any library, NaN and infinities among them; no bool, and no array or tensor."""
    if type(value) is float:
        return value
    if not isinstance(value, (str, bytes)) and not _is_bool(value) and not hasattr(value, "dim"):
        try:
            if not getattr(value, "ndim", 0):
                return float(value)
        except Exception:  # noqa: BLE001 - whatever it is, it is no number, or none that a float can be
            pass
    raise wrong(name, value, what, error) from None


def word(name: str, value: Any, known: Collection[str], error: Error = SelectionError) -> str:
    """One of some words."""
    if isinstance(value, str) and value in known:
        return value
    raise wrong(name, value, f"one of {', '.join(known)}", error)


def text(name: str, value: Any, what: str = "text", error: Error = InputError) -> str:
    """A string."""
    if isinstance(value, str):
        return value
    raise wrong(name, value, what, error)


def path(name: str, value: Any, error: Error = InputError) -> str:
    """The path of a file, as a string. One that no system can have a file at is refused as one that is not there."""
    if not isinstance(value, (str, PathLike)) or not isinstance(found := fspath(value), str):
        raise wrong(name, value, "the path of a file, a str or an os.PathLike")
    if not found or "\0" in found:
        raise wrong(name, value, "the path of a file, which is not empty and has no NUL character", error)
    try:
        found.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise wrong(name, value, "the path of a file, in characters that can be encoded", error) from None
    return found


def function(
    name: str, value: Callable[..., Kind], what: str = "a function", error: Error = InputError
) -> Callable[..., Kind]:
    """Something that can be called."""
    if not callable(value):
        raise wrong(name, value, what, error)
    return value


def one_of(
    name: str, value: Any, kind: type[Kind] | tuple[type[Kind], ...], what: str, error: Error = InputError
) -> Kind:
    """An object of a class."""
    if isinstance(value, kind):
        return value
    raise wrong(name, value, what, error)


def several(name: str, value: Any, kind: type[Kind], what: str, error: Error = InputError) -> Sequence[Kind]:
    """Several objects of a class, as a list."""
    items = None if isinstance(value, Mapping) else items_of(value)
    if items is None:
        raise wrong(name, value, what, error)
    bad = [item for item in items if not isinstance(item, kind)]
    if bad:
        raise wrong(name, bad[0], f"{what}, and nothing else in it", error)
    return items


def ordered_items(value: Any) -> list[Any] | None:
    """What is in a sequence, in its order; None: it is text, or has no order, or cannot be gone through."""
    return None if isinstance(value, (Mapping, Set)) else items_of(value)


def items_of(value: Any) -> list[Any] | None:
    """What can be gone through, as a list; None: it is text, or cannot be. What fails on the way is the caller's."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return None
    try:
        source = iter(value)
    except Exception:  # noqa: BLE001 - a tensor of one number has the method, and so has one that is sparse
        return None
    return list(source)
