"""What the document of a trace file says of a trace, its calls, sites and certificates: each value stands here once.

The tables are in the order of the document. What writes one (:func:`to_entry`) and what checks and reads it
(:func:`from_entry`) both go by them. docs/trace-format.md says what the values mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from ..attention.kernel_call import BASES, DERIVED, DOT, KERNEL_BASIS
from ..attention.normalizers import SOFTMAX
from ..calls.certificate import STATUSES
from ..calls.edits import EDITED
from ..calls.shard import SHARDED_AXES
from ..errors import TraceWriteError
from ..printable import printable
from .format import FLOATING
from .json_values import DEEPEST, json_number, nesting

FIRST = (1, 0)
_LARGEST = 2**63 - 1  # what torch can count
_MOST = torch.finfo(torch.float32).max  # what torch can multiply scores with


class Kind(NamedTuple):
    """A kind of value.

    Attributes:
        expected: it, in words.
        types: what type() of a value of the document may be; not isinstance, as True is an int too.
        fits: whether a value of one of these types is of this kind; None: each is.
        write: its form in the document; None: as it is.
        read: what it is in memory; None: as it is.
    """

    expected: str
    types: tuple[type, ...]
    fits: Callable[[Any], bool] | None = None
    write: Callable[[Any], Any] | None = None
    read: Callable[[Any], Any] | None = None


def _all(kind: type) -> Callable[[Iterable[Any]], bool]:
    return lambda x: all(type(each) is kind for each in x)


def _are_counts(x: list[Any]) -> bool:
    return all(type(each) is int and 0 <= each <= _LARGEST for each in x)


def _are_different_counts(x: list[Any]) -> bool:
    return bool(x) and _are_counts(x) and len(set(x)) == len(x)


def _are_pairs(x: list[Any]) -> bool:
    return all(type(each) is list and len(each) == 2 and _are_counts(each) for each in x)


def _as_lists(x: Iterable[Iterable[int]]) -> list[list[int]]:
    return [list(each) for each in x]


def _as_pairs(x: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(each) for each in x)


def _are_texts(x: list[Any]) -> bool:
    return all(type(row) is list and all(type(each) is str for each in row) for row in x)


def _are_segments(x: list[Any]) -> bool:
    return all(type(row) is list and all(type(n) is int and n >= -1 for n in row) for row in x)


_NAMES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""JSON has no word for a number that is not finite: its name stands there."""


def _number(x: Any) -> float:
    """The number that a value says. Of a word or an integer that is none, or of more digits than a float has, NaN."""
    if type(x) is str:
        return _NAMES.get(x, math.nan)
    try:
        return float(x)
    except OverflowError:
        return math.nan


def _is_error(x: Any) -> bool:
    # An error that was measured of a model which computes NaN or infinities is that, too.
    number = _number(x)
    return number >= 0 or x == "nan" or (type(x) is float and math.isnan(x))


def _is_scale(x: Any) -> bool:
    return type(x.get("tensor")) is str if type(x) is dict else abs(_number(x)) <= _MOST


def _is_basis(x: dict[str, Any]) -> bool:
    return all(letter in KERNEL_BASIS and how in BASES for letter, how in x.items())


_KINDS: dict[str, Kind] = {
    "bool": Kind("true or false", (bool,)),
    "count": Kind("an integer from 0", (int,), lambda x: 0 <= x <= _LARGEST),
    "str": Kind("a string", (str,)),
    "object": Kind("an object", (dict,)),
    "data": Kind(f"an object of at most {DEEPEST} levels", (dict,), lambda x: nesting(x) <= DEEPEST),
    "error": Kind("a number from 0", (int, float, str), _is_error, json_number, _number),
    "factor": Kind("a finite number other than 0", (int, float), lambda x: 0 < abs(_number(x)) <= _MOST, None, _number),
    "probability": Kind("a number from 0 to 1", (int, float), lambda x: 0 <= _number(x) <= 1, None, _number),
    "scale": Kind('a finite number or {"tensor": name}', (int, float, dict), _is_scale),
    "counts": Kind("a list of integers from 0", (list,), _are_counts, list, tuple),
    "numbers": Kind("a list of different integers from 0", (list,), _are_different_counts, list, tuple),
    "pairs": Kind("a list of pairs of integers from 0", (list,), _are_pairs, _as_lists, _as_pairs),
    "word": Kind("a printable string that is not empty", (str,), lambda x: x != "" and printable(x) == x),
    "axis": Kind(f"one of {', '.join(SHARDED_AXES)}", (str,), SHARDED_AXES.__contains__),
    "edited": Kind(f"one of {', '.join(EDITED)}", (str,), EDITED.__contains__),
    "strs": Kind("a list of strings", (list,), _all(str), list, tuple),
    "objects": Kind("a list of objects", (list,), _all(dict)),
    "texts": Kind("a list of lists of strings", (list,), _are_texts),
    "segments": Kind("a list of lists of integers from -1", (list,), _are_segments),
    "dtype": Kind(
        "the name of a floating dtype",
        (str,),
        FLOATING.__contains__,
        lambda x: str(x).removeprefix("torch."),
        FLOATING.__getitem__,
    ),
    "stacks": Kind(
        "an object of lists of lists of strings",
        (dict,),
        lambda x: all(type(rows) is list and _are_texts(rows) for rows in x.values()),
        dict,
    ),
    "names": Kind(
        "an object of strings and nulls", (dict,), lambda x: all(n is None or type(n) is str for n in x.values())
    ),
    "words": Kind("an object of strings", (dict,), lambda x: _all(str)(x.values()), dict),
    "basis": Kind(f"an object of {', '.join(KERNEL_BASIS)} and the words {', '.join(BASES)}", (dict,), _is_basis, dict),
    "status": Kind(f"one of {', '.join(STATUSES)}", (str,), STATUSES.__contains__),
    "derivable": Kind(
        f"a list of {', '.join(DERIVED)}", (list,), lambda x: all(name in DERIVED for name in x), list, tuple
    ),
    "links": Kind("an object of objects", (dict,), lambda x: _all(dict)(x.values())),
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


class _Reader(NamedTuple):
    """What is asked of a :class:`Scalar` for each object that is read or written, worked out once."""

    name: str
    kind: Kind
    may_be_null: bool
    needed: bool
    default: Any


class Table(tuple[Scalar, ...]):
    """The values of one object of the document; ``optional`` of those may all be missing."""

    readers: tuple[_Reader, ...]

    def __new__(cls, *scalars: Scalar, optional: bool = False) -> Table:
        made = super().__new__(cls, scalars)
        made.readers = tuple(
            _Reader(
                s.name,
                _KINDS[s.kind.removesuffix("?")],
                s.kind.endswith("?"),
                s.since == FIRST and not optional,
                s.default,
            )
            for s in scalars
        )
        return made


DOCUMENT = Table(
    Scalar("model", "data"),
    Scalar("selection", "data"),
    Scalar("tokens", "texts?"),
    Scalar("notes", "strs"),
    Scalar("skipped", "objects"),
    Scalar("calls", "objects"),
    Scalar("compact", "bool"),
    Scalar("stack_tokens", "stacks?", since=(1, 3)),
    Scalar("segments", "segments?", since=(1, 3)),
)
MODEL = Table(Scalar("class", "str"), Scalar("module", "str"), Scalar("versions", "words"), optional=True)
"""What is read of the model; a trace that was made by hand has none of it."""
SKIPPED = Table(Scalar("path", "str"), Scalar("reason", "str"), Scalar("steps", "counts"))
CALL = Table(
    Scalar("site", "object"),
    Scalar("step", "count"),
    Scalar("tap", "str"),
    Scalar("dtype", "dtype"),
    Scalar("scale", "scale"),
    Scalar("softcap", "factor?"),
    Scalar("causal", "bool"),
    Scalar("window", "count?"),
    Scalar("dropout", "probability"),
    Scalar("heads", "counts?"),
    Scalar("own_scores", "bool"),
    Scalar("mixed", "bool"),
    Scalar("kv_heads", "counts?"),
    Scalar("queries", "counts?"),
    Scalar("notes", "strs"),
    Scalar("fields", "names"),
    Scalar("derivable", "derivable"),
    Scalar("certificate", "object"),
    Scalar("keys", "count?", since=(1, 1)),
    Scalar("of_queries", "count?", since=(1, 2)),
    Scalar("continued", "links?", since=(1, 3)),
    Scalar("basis", "basis", since=(1, 3), default={}),
    Scalar("entry", "str", since=(1, 3), default=""),
    Scalar("score", "str", since=(1, 3), default=DOT),
    Scalar("normalizer", "str", since=(1, 3), default=SOFTMAX),
    Scalar("output_grad", "str?", since=(1, 3)),
    Scalar("edits", "objects", since=(1, 3), default=()),
    Scalar("own_by_edits", "bool", since=(1, 3), default=False),
    Scalar("shards", "objects", since=(1, 3), default=()),
    Scalar("requests", "strs?", since=(1, 3)),
    Scalar("lengths", "pairs?", since=(1, 3)),
)
SHARD = Table(
    Scalar("axis", "axis"),
    Scalar("start", "count?"),
    Scalar("of", "count?"),
    Scalar("group_start", "count?"),
    Scalar("groups_of", "count?"),
    Scalar("mesh", "str"),
    Scalar("index", "count"),
    Scalar("count", "count"),
)
EDIT = Table(
    Scalar("edit", "word"),
    Scalar("field", "edited"),
    Scalar("heads", "numbers?"),
    Scalar("queries", "numbers?"),
    Scalar("keys", "numbers?"),
    Scalar("batch", "numbers?"),
    Scalar("note", "str"),
)
LINK = Table(
    Scalar("continues", "count"),
    Scalar("batch", "counts?"),
    Scalar("dropped", "count"),
    Scalar("at", "count"),
    Scalar("tensor", "str?"),
)
SITE = Table(
    Scalar("path", "str"),
    Scalar("layer", "count?"),
    Scalar("stack", "str"),
    Scalar("kind", "str"),
    Scalar("module", "str"),
    Scalar("axes", "str"),
    Scalar("layers", "count?"),
)
CERTIFICATE = Table(
    Scalar("status", "status"),
    Scalar("output_error", "error"),
    Scalar("weights_error", "error?"),
    Scalar("row_sum_error", "error"),
    Scalar("tolerance", "error"),
    Scalar("weights_tolerance", "error"),
    Scalar("rows", "count"),
    Scalar("of_rows", "count"),
    Scalar("basis", "str"),
)


def to_entry(table: Table, x: Any, **parts: Any) -> dict[str, Any]:
    """An object of the document.

    Args:
        table: its values.
        x: what has them as attributes.
        parts: those whose form in the document needs more than the value: the form.

    Raises:
        TraceWriteError: a value is of a kind that nobody could read back; names it.
    """
    made: dict[str, Any] = {}
    for name, kind, may_be_null, needed, default in table.readers:
        if name in parts:
            value = parts[name]
        else:
            value = getattr(x, name)
            value = value if value is None or kind.write is None else kind.write(value)
        if needed or value != default:
            if not (_fits(kind, value) or (value is None and may_be_null)):
                raise TraceWriteError(f"{type(x).__name__}: {_told(name, value, kind, may_be_null)}.")
            made[name] = value
    return made


def from_entry(table: Table, where: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The values of an object of the document, without those that its format version does not have yet.

    Keys that are in no table are those of a newer minor version, and are passed over.

    Raises:
        TypeError: a value is missing, or of another kind; names it, and ``where``.
    """
    found: dict[str, Any] = {}
    for name, kind, may_be_null, needed, _ in table.readers:
        x = entry.get(name, _MISSING)
        if x is _MISSING:
            if needed:
                raise TypeError(f"{where} has no {name!r}")
        elif x is None and may_be_null:
            found[name] = None
        elif type(x) in kind.types and (kind.fits is None or kind.fits(x)):
            found[name] = x if kind.read is None else kind.read(x)
        else:
            raise TypeError(f"{where}: {_told(name, x, kind, may_be_null)}")
    return found


_MISSING = object()


def _fits(kind: Kind, x: Any) -> bool:
    return type(x) in kind.types and (kind.fits is None or kind.fits(x))


def _told(name: str, x: Any, kind: Kind, may_be_null: bool) -> str:
    return f"{name!r} is {shown(x)}, expected {kind.expected}{' or null' if may_be_null else ''}"


def shown(x: Any) -> str:
    """A value of a document in a message, whatever it is."""
    try:
        return repr(x)[:60]
    except (RecursionError, ValueError):  # nested deeper than repr can go, or an integer of more digits than it may
        return f"a {type(x).__name__}"
