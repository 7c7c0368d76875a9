"""What the document of a trace file says of a trace, its calls, sites and certificates: each value stands here once.

The tables are in the order of the document. What writes one (:func:`to_entry`) and what checks and reads it
(:func:`from_entry`) both go by them. docs/trace-format.md says what the values mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from ..attention.kernel_call import DOT
from ..attention.normalizers import SOFTMAX
from .json_values import json_number

FIRST = (1, 0)


def _as_it_is(x: Any) -> Any:
    return x


class Kind(NamedTuple):
    """A kind of value.

    Attributes:
        fits: whether a value of the document is of this kind.
        write: its form in the document.
        read: what it is in memory.
    """

    fits: Callable[[Any], bool]
    write: Callable[[Any], Any] = _as_it_is
    read: Callable[[Any], Any] = _as_it_is


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda x: type(x) in types  # not isinstance: True is an int too


def _is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: type(x) is list and all(map(fits, x))


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) or x in ("nan", "inf", "-inf")


_KINDS: dict[str, Kind] = {
    "bool": Kind(_is(bool)),
    "int": Kind(_is(int)),
    "str": Kind(_is(str)),
    "object": Kind(_is(dict)),
    # JSON has no word for a number that is not finite: its name stands there.
    "number": Kind(_is_number, json_number, lambda x: float(x) if type(x) is str else x),
    "ints": Kind(_is_list_of(_is(int)), list, tuple),
    "strs": Kind(_is_list_of(_is(str)), list, tuple),
    "objects": Kind(_is_list_of(_is(dict))),
    "texts": Kind(_is_list_of(_is_list_of(_is(str)))),
    "dtype": Kind(
        lambda x: type(x) is str and isinstance(getattr(torch, x, None), torch.dtype),
        lambda x: str(x).removeprefix("torch."),
        lambda x: getattr(torch, x),
    ),
    "stacks": Kind(lambda x: type(x) is dict and all(map(_is_list_of(_is_list_of(_is(str))), x.values())), dict),
    "names": Kind(lambda x: type(x) is dict and all(type(n) in (str, type(None)) for n in x.values())),
    "words": Kind(lambda x: type(x) is dict and all(type(word) is str for word in x.values()), dict),
    "links": Kind(lambda x: type(x) is dict and all(type(link) is dict for link in x.values())),
    "scale": Kind(lambda x: _is_number(x) or (type(x) is dict and type(x.get("tensor")) is str)),
}


class Scalar(NamedTuple):
    """A value of the document.

    Attributes:
        name: its key, and the attribute that it is the value of.
        kind: a key of the kinds above; with ``?`` at its end it may be null.
        since: the format version that has it first. A later one than :data:`FIRST` is left out where it is the default
            of the attribute, and a file that does not have it is read with that.
        default: that.
    """

    name: str
    kind: str
    since: tuple[int, int] = FIRST
    default: Any = None


DOCUMENT = (
    Scalar("model", "object"),
    Scalar("selection", "object"),
    Scalar("tokens", "texts?"),
    Scalar("notes", "strs"),
    Scalar("skipped", "objects"),
    Scalar("calls", "objects"),
    Scalar("stack_tokens", "stacks?", since=(1, 3)),
)
SKIPPED = (Scalar("path", "str"), Scalar("reason", "str"), Scalar("steps", "ints"))
CALL = (
    Scalar("site", "object"),
    Scalar("step", "int"),
    Scalar("tap", "str"),
    Scalar("dtype", "dtype"),
    Scalar("scale", "scale"),
    Scalar("softcap", "number?"),
    Scalar("causal", "bool"),
    Scalar("window", "int?"),
    Scalar("dropout", "number"),
    Scalar("heads", "ints?"),
    Scalar("own_scores", "bool"),
    Scalar("mixed", "bool"),
    Scalar("kv_heads", "ints?"),
    Scalar("queries", "ints?"),
    Scalar("notes", "strs"),
    Scalar("fields", "names"),
    Scalar("derivable", "strs"),
    Scalar("certificate", "object"),
    Scalar("keys", "int?", since=(1, 1)),
    Scalar("of_queries", "int?", since=(1, 2)),
    Scalar("continued", "links?", since=(1, 3)),
    Scalar("basis", "words", since=(1, 3), default={}),
    Scalar("entry", "str", since=(1, 3), default=""),
    Scalar("score", "str", since=(1, 3), default=DOT),
    Scalar("normalizer", "str", since=(1, 3), default=SOFTMAX),
)
LINK = (
    Scalar("continues", "int"),
    Scalar("batch", "ints?"),
    Scalar("dropped", "int"),
    Scalar("at", "int"),
    Scalar("tensor", "str?"),
)
SITE = (
    Scalar("path", "str"),
    Scalar("layer", "int?"),
    Scalar("stack", "str"),
    Scalar("kind", "str"),
    Scalar("module", "str"),
    Scalar("axes", "str"),
    Scalar("layers", "int?"),
)
CERTIFICATE = (
    Scalar("status", "str"),
    Scalar("output_error", "number"),
    Scalar("weights_error", "number?"),
    Scalar("row_sum_error", "number"),
    Scalar("tolerance", "number"),
    Scalar("weights_tolerance", "number"),
    Scalar("rows", "int"),
    Scalar("of_rows", "int"),
    Scalar("basis", "str"),
)


def to_entry(table: Iterable[Scalar], x: Any, **parts: Any) -> dict[str, Any]:
    """An object of the document.

    Args:
        table: its values.
        x: what has them as attributes.
        parts: those whose form in the document needs more than the value: the form.
    """
    made: dict[str, Any] = {}
    for name, kind, since, default in table:
        if name in parts:
            value = parts[name]
        else:
            value = getattr(x, name)
            value = None if value is None else _KINDS[kind.removesuffix("?")].write(value)
        if since == FIRST or value != default:
            made[name] = value
    return made


def from_entry(table: Iterable[Scalar], where: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The values of an object of the document, without those that its format version does not have yet.

    Keys that are in no table are those of a newer minor version, and are passed over.

    Raises:
        TypeError: a value is missing, or of another kind; names it, and ``where``.
    """
    found: dict[str, Any] = {}
    for name, kind, since, _ in table:
        if name not in entry:
            if since == FIRST:
                raise TypeError(f"{where} has no {name!r}")
            continue
        x, (fits, _, read) = entry[name], _KINDS[kind.removesuffix("?")]
        if x is None and kind.endswith("?"):
            found[name] = None
        elif fits(x):
            found[name] = read(x)
        else:
            raise TypeError(f"{where}: {name!r} is {repr(x)[:60]}, expected {kind.replace('?', ' or null')}")
    return found
