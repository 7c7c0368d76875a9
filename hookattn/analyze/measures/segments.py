"""The sentences of a pair: what goes from one to the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from ...calls.key_tokens import lists_of_keys
from ...tokens.pieces import SEPARATORS
from ..call_view import View
from ..labels import PADDING, Rows, as_label_rows, key_labels, with_padding_marked
from .label_mass import Labelled, LabelMass, label_table

if TYPE_CHECKING:
    from pandas import DataFrame

    from ...traces import TraceLike


@lru_cache(maxsize=256)
def segment_of(tokens: tuple[str, ...]) -> tuple[int, ...]:
    """For each token the number of its segment, from 0; −1 for padding.

    A separator ends the segment that it follows and is part of it, and so are more separators right after it.

    Args:
        tokens: S, with ``[PAD]`` where there is padding.
    """
    made: list[int] = []
    segment, begun, ended = 0, False, False
    for token in tokens:
        if token == PADDING:
            made.append(-1)
            continue
        # RoBERTa writes two separators between a pair, so that a run of them is one border. Before any text there is
        # none to end: GPT-2's <|endoftext|> may begin a sequence.
        mark = token in SEPARATORS
        if ended and not mark:
            segment, ended = segment + 1, False
        begun = begun or not mark
        ended = ended or (mark and begun)
        made.append(segment)
    return tuple(made)


@dataclass(frozen=True, kw_only=True)
class BetweenSegments(LabelMass):
    """The weight of the tokens of one segment on those of another, the mean over the first's queries.

    Args:
        source: the segment of the queries; ``"A"`` is the first, or what ``labels`` calls it.
        target: the segment of the keys.
        labels: for each token its segment, ints (``token_type_ids``) from 0 for A; None: separators set them apart.
    """

    name: ClassVar[str] = "between_segments"
    labels: Rows | None = field(default=None, repr=False)  # type: ignore[assignment]
    target: str = "B"
    source: str = "A"

    def __post_init__(self) -> None:
        if self.labels is not None:
            super().__post_init__()
        self._check_ends()

    def labelled(self, view: View) -> Labelled:
        """See :class:`~hookattn.analyze.measures.label_mass.LabelMass`."""
        return _segments(view, self.labels)


def between_segments(trace: TraceLike, segments: Any = None, *, real: Any = None) -> DataFrame:
    """A→A, A→B, B→A and B→B: how much the tokens of each segment attend to those of each.

    Args:
        trace: with weights.
        segments: for each token its segment, ints (``token_type_ids``) from 0 for A, or names; one list, or one for
            each batch entry; None: the separators of the trace's tokens set them apart.
        real: bool or 0/1, B S: True = a real token, no padding.

    Returns:
        See :func:`hookattn.analyze.between_labels`.

    Raises:
        MeasureError: the segments don't fit a call, or there are no tokens to find them by.
        FieldNotCaptured: the weights were not kept.
    """
    given = None if segments is None else as_label_rows(segments, "segments")
    return label_table(trace, lambda view: _segments(view, given), real)


def _segments(view: View, given: Rows | None) -> Labelled:
    numbers = segments_of_keys(view) if given is None else key_labels(view, given, "segments")
    if isinstance(numbers, str):
        return numbers
    return [tuple(_letter(x) for x in row) for row in numbers]


def segments_of_keys(view: View) -> list[tuple[int, ...]] | str:
    """B S: the number of the segment of each key, −1 for padding: as the trace says, else as separators set them
    apart; text: why there are none."""
    trace = view.trace
    if trace.segments is not None and lists_of_keys(view.traced, trace) == trace.tokens:
        return key_labels(view, as_label_rows(trace.segments, "trace.segments"), "segments")
    found = key_labels(view)
    return found if isinstance(found, str) else [segment_of(row) for row in with_padding_marked(view, found)]


def _letter(segment: Any) -> Any:
    """``A`` for 0, and so on; a name as it is."""
    if isinstance(segment, int):
        return None if segment < 0 else chr(ord("A") + segment) if segment < 26 else str(segment)
    return segment
