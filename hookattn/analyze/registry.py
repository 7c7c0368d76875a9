"""All measures of a head by their names, and the table of those that a caller names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .. import checks
from ..errors import SelectionError
from ..statistics.base import Statistic
from .measures.acronym import Acronyms
from .measures.base import Measure
from .measures.confidence import Confidence
from .measures.entropy import Entropy, NormalisedEntropy
from .measures.lexical import Brackets, SameWord
from .measures.list_items import ListItems
from .measures.local import GlobalSpread, LocalMass
from .measures.mean_distance import MeanDistance
from .measures.offset import NextToken, PreviousToken, SelfToken
from .measures.positional import Positional
from .measures.repeats import DuplicateToken, Induction
from .measures.separator import Punctuation, Separators
from .measures.sink import FirstToken, LearnedSink, Sink
from .measures.values import ValueNorm
from .table import measure_table

if TYPE_CHECKING:
    from pandas import DataFrame

    from ..traces import TraceLike

MEASURES: dict[str, type[Measure]] = {
    kind.name: kind
    for kind in (
        Entropy,
        NormalisedEntropy,
        Confidence,
        LocalMass,
        GlobalSpread,
        MeanDistance,
        PreviousToken,
        NextToken,
        SelfToken,
        FirstToken,
        Sink,
        LearnedSink,
        Positional,
        Induction,
        DuplicateToken,
        Separators,
        Punctuation,
        SameWord,
        Brackets,
        ListItems,
        Acronyms,
        ValueNorm,
    )
}


def resolve(measures: str | Measure | Iterable[str | Measure], empty: bool = False) -> list[Measure]:
    """Measures by name, or as they are; ``empty``: whether there may be none.

    Raises:
        SelectionError: there is no such measure, nothing was named, or two measures differ in their labels alone.
    """
    given: Any = [measures] if isinstance(measures, (str, Measure)) else measures
    several: Sequence[Any] = checks.several("measures", given, object, "names of measures, or measures themselves")
    if not several and not empty:
        raise SelectionError(f"no measure was named; there are {', '.join(MEASURES)}.")
    made: dict[str, Measure] = {}
    for one in map(_measure_of, several):
        if made.setdefault(one.key, one) != one:
            raise SelectionError(
                f"two measures {one.key!r} have other labels or tokens; measure them one after the other."
            )
    return list(made.values())


def _measure_of(item: str | Measure) -> Measure:
    if isinstance(item, Measure):
        return item
    if not isinstance(item, str) or item not in MEASURES:
        hint = " (a class: give an object of it)" if isinstance(item, type) else ""
        raise SelectionError(f"there is no measure {checks.printed(item)}{hint}; there are {', '.join(MEASURES)}.")
    return MEASURES[item]()


def measure(
    trace: TraceLike,
    measures: str | Measure | Iterable[str | Measure],
    *,
    by: str = "head",
    real: Any = None,
    missing: bool = False,
) -> DataFrame:
    """Measures of every head of a trace; what they share is computed once.

    Args:
        trace: in memory, loaded, or compact; with weights, or what they can be derived of, or the statistics that the
            measures are made of (``capture=hookattn.analyze.capture(…)``).
        measures: names or :class:`Measure` objects.
        by: ``"head"``: a row for each call and head, averaged over the batch; ``"example"``: for each batch entry too;
            ``"query"``: for each query too, which only measures that are means over queries have; its ``token`` is
            missing where the trace's tokens are not those of the call.
        real: bool or 0/1, B S, an ``attention_mask``: True = a real token, no padding. Without it those keys are real
            that some query may attend to.
        missing: whether a measure that is not defined for a call is NaN there, instead of an error.

    Returns:
        A pandas DataFrame with ``call``, ``step``, ``layer``, ``stack``, ``kind``, ``path``, ``head`` (and ``example``,
        ``query``, ``token``), and one column for each measure. Its ``attrs["units"]`` has their units.

    Raises:
        MeasureError: a measure is not defined for a call, and not ``missing``; or the trace has no calls.
        FieldNotCaptured: the trace lacks a field; names the measure, the call and the ``capture=`` that keeps it.
        SelectionError: an unknown measure or ``by``.
    """
    checks.flag("missing", missing)
    return measure_table(trace, resolve(measures), by=by, real=real, missing=missing)


def capture(*measures: str | Measure) -> tuple[str | Statistic, ...]:
    """What to give to ``capture=``: the statistics and fields that measures are made of.

    Args:
        measures: names or objects; none: all that can be computed beside the kernel.

    Raises:
        SelectionError: there is no such measure.
    """
    chosen = resolve(measures) if measures else [m for m in map(_measure_of, MEASURES) if m.statistics and not m.reads]
    return tuple({x if isinstance(x, str) else x.key: x for m in chosen for x in m.capture}.values())
