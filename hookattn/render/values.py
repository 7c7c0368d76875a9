"""The numbers of a picture: a field with its masked entries apart, without the sink, pooled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import checks
from ..attention.normalizers import is_softmax
from ..calls.part import Part
from ..errors import SelectionError
from .scale import scale_end

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
Field = Literal["weights", "applied", "scores", "mask"]
Scale = Literal["linear", "log"]
Sink = Literal["show", "drop", "renormalise"]

FIELDS, SCALES, SINKS = ("weights", "applied", "scores", "mask"), ("linear", "log"), ("show", "drop", "renormalise")
WEIGHTS = ("weights", "applied")
"""The weights as the softmax made them, and as they met the values: the fields that rows share out."""
FLOOR = 1e-4
"""The least weight that a logarithmic scale tells from 0."""
UNKNOWN = "mask not captured: a 0 may be a masked entry"
"""What a picture says that can't set masked entries apart."""


@dataclass(frozen=True, eq=False)
class DrawnValues:
    """What is drawn of a part.

    Attributes:
        data: H rows columns, float64; masked where the mask hides a key, or where nothing is left to divide by.
        rows, columns: which queries and keys these are.
        notes: what a reader has to know.
        block: so many rows and columns make one of ``data``, their largest.
        masked: whether any entry is masked, in a block or alone.
        largest: the largest magnitude of what is finite and not masked; 0 where nothing is.
        negative: whether any of it is below 0.
        ends: for each head where a linear scale of its weights ends, see :func:`hookattn.render.scale.scale_end`; for
            other fields its largest magnitude.
    """

    data: np.ma.MaskedArray[Any, Any]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    notes: tuple[str, ...]
    block: int
    masked: bool
    largest: float
    negative: bool
    ends: tuple[float, ...]

    @property
    def end(self) -> float:
        """Where the colours end that all heads share: at the largest of their ends."""
        return max(self.ends)


def check_options(field: str, scale: str, sink: str) -> None:
    """Whether these go together.

    Raises:
        SelectionError: an unknown word, a logarithm of scores, or scores made to sum to 1.
    """
    for name, value, known in (("field", field, FIELDS), ("scale", scale, SCALES), ("sink", sink, SINKS)):
        checks.word(name, value, known)
    if scale == "log" and field not in WEIGHTS:
        raise SelectionError(f"scale='log' is for weights; field={field!r} has no logarithm.")
    if sink == "renormalise" and field not in WEIGHTS:
        raise SelectionError(f"sink='renormalise' is for weights; drop the first key of {field} with sink='drop'.")


def drawn_values(
    part: Part, field: str = "weights", sink: str = "show", *, most: int | None = None, first: int | None = None
) -> DrawnValues:
    """A field of the drawn heads, queries and keys; beside what is returned it holds one head at a time.

    Args:
        part: what is drawn.
        field: ``weights``; ``applied``, what met the values, which are the weights where nothing changed them;
            ``scores``; or ``mask`` (1: may attend).
        sink: ``drop`` leaves out the first key, where models park attention that has nowhere to go; ``renormalise``
            also divides each row by what is left without it.
        most: of more rows or columns than these each block's largest is taken, see :func:`block_maxima`.
        first: the first key; None: :func:`first_key`.

    Raises:
        FieldNotCaptured: the field was not kept.
        SelectionError: without the first key there is none left.
    """
    drawn = drawn_field(part, field)
    notes = [*([] if part.call.has("mask") else [UNKNOWN]), *notes_on_weights(part, field)]
    columns = part.columns
    if sink != "show":
        first = part.first_key if first is None else first
        columns = tuple(j for j in columns if j != first)
        notes.append("first key left out" + (", rows divided by the rest" if sink == "renormalise" else ""))
    if not columns:
        raise SelectionError(f"sink={sink!r}: the first key is the only one that is drawn.")
    most = max(len(part.rows), len(columns)) if most is None else most
    images, block, masked, largest, negative = [], 1, False, 0.0, False
    ends: list[float] = []
    resting = columns.index(part.first_key) if sink == "show" and part.first_key in columns else None
    for one in part.each_head():
        data = _drawn_head(one, drawn, columns, first if sink == "renormalise" else None)
        masked = masked or bool(np.ma.getmaskarray(data).any())
        largest = max(largest, largest_magnitude(data))
        ends.append(scale_end(data[0], resting) if drawn in WEIGHTS else largest_magnitude(data))
        negative = negative or has_negative(data)
        image, block = block_maxima(data, most, far=drawn in WEIGHTS and has_negative(data))
        images.append(image)
    whole = np.ma.masked_array(np.concatenate([x.data for x in images]), np.concatenate([x.mask for x in images]))
    return DrawnValues(whole, part.rows, columns, tuple(notes), block, masked, largest, negative, tuple(ends))


def drawn_field(part: Part, field: str) -> str:
    """The field that is drawn where one is asked for: weights that nothing changed are what met the values."""
    return "weights" if field == "applied" and not has_applied(part) else field


def has_applied(part: Part) -> bool:
    """Whether what met the values is there apart from the weights."""
    return part.call.fields.get("applied") is not None


def notes_on_weights(part: Part, field: str) -> list[str]:
    """What a reader of weights has to know: which of two they are, and that they are no softmax."""
    if field not in WEIGHTS:
        return []
    notes = []
    if has_applied(part):
        notes.append(
            "weights as the softmax made them; field='applied' is what met the values"
            if field == "weights"
            else "weights as they met the values, changed after the softmax"
        )
    if not is_softmax(part.call.normalizer):
        notes.append(f"no softmax (normalizer {part.call.normalizer})")
    return notes


def _drawn_head(
    part: Part, field: str, columns: tuple[int, ...], shared_out: int | None
) -> np.ma.MaskedArray[Any, Any]:
    """1 rows columns of a part of one head; ``shared_out``: the key without which its rows sum to 1, if any."""
    data, hidden = part_array(part, field), hidden_keys(part)
    hidden = np.zeros(data.shape, bool) if hidden is None else hidden
    if shared_out is not None:
        left = np.delete(data, shared_out, -1).sum(-1, keepdims=True)
        hidden = hidden | (left <= 0)
        data = np.divide(data, left, out=np.zeros_like(data), where=left > 0)
    cut = np.ix_(range(len(data)), part.rows, columns)
    return np.ma.masked_array(data[cut], hidden[cut])


def largest_magnitude(data: np.ma.MaskedArray[Any, Any]) -> float:
    """The largest magnitude of what is finite and not masked; 0 where nothing is."""
    finite = np.ma.masked_invalid(data).compressed()
    return float(np.abs(finite).max()) if finite.size else 0.0


def has_negative(data: np.ma.MaskedArray[Any, Any]) -> bool:
    """Whether any entry that is not masked is below 0."""
    return bool((np.ma.filled(data.astype(float), 0.0) < 0).any())


def part_array(part: Part, name: str, query: int | None = None) -> Array:
    """:meth:`Part.tensor` as numpy takes it."""
    return part.tensor(name, query).numpy()


def hidden_keys(part: Part, query: int | None = None) -> Flags | None:
    """:meth:`Part.hidden` as numpy takes it."""
    hidden = part.hidden(query)
    return None if hidden is None else hidden.numpy()


def block_maxima(
    data: np.ma.MaskedArray[Any, Any], most: int, far: bool = False
) -> tuple[np.ma.MaskedArray[Any, Any], int]:
    """The largest entry of each n × n block, n the least that leaves at most ``most`` rows and columns; and n.

    A block is masked where all of it is. Never a mean: a single key that takes all attention stays as it is.

    Args:
        data: … rows columns.
        most: at least 1.
        far: of weights below 0, too, the largest is what is farthest from 0.
    """
    n = max(1, math.ceil(max(data.shape[-2:]) / most))
    if n == 1:
        return data, 1
    rows, columns = (np.arange(0, size, n) for size in data.shape[-2:])
    # Hidden entries are −∞, which no maximum takes: a block is −∞ only where all of it is hidden.
    low = np.ma.filled(data.astype(float), -np.inf)
    made = np.maximum.reduceat(np.maximum.reduceat(low, rows, -2), columns, -1)
    hidden = np.isneginf(made)
    if far:
        high = np.ma.filled(data.astype(float), np.inf)
        least = np.minimum.reduceat(np.minimum.reduceat(high, rows, -2), columns, -1)
        made = np.where(~hidden & (-least > made), least, made)
    return np.ma.masked_array(made, hidden), n
