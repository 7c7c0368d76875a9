"""All measures of a head, in one place, and what a caller may say of them."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import SelectionError
from ..statistics.base import Statistic
from .acronym import Acronyms
from .confidence import Confidence
from .distance import MeanDistance
from .entropy import Entropy, NormalisedEntropy
from .lexical import Brackets, SameWord
from .list_items import ListItems
from .local import GlobalSpread, LocalMass
from .measure import Measure
from .offset import NextToken, PreviousToken, SelfToken
from .positional import Positional
from .repeats import DuplicateToken, Induction
from .separator import Punctuation, Separators
from .sink import FirstToken, LearnedSink, Sink
from .values import ValueNorm

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


def resolve(measures: str | Measure | Iterable[str | Measure]) -> list[Measure]:
    """Measures by name, or as they are.

    Raises:
        SelectionError: there is no such measure, nothing was named, or two measures differ in their labels alone.
    """
    several = [measures] if isinstance(measures, (str, Measure)) else list(measures)
    if not several:
        raise SelectionError(f"no measure was named; there are {', '.join(MEASURES)}.")
    made: dict[str, Measure] = {}
    for one in map(_one, several):
        if made.setdefault(one.key, one) != one:
            raise SelectionError(
                f"two measures {one.key!r} have other labels or tokens; measure them one after the other."
            )
    return list(made.values())


def _one(item: str | Measure) -> Measure:
    if isinstance(item, Measure):
        return item
    if item not in MEASURES:
        raise SelectionError(f"there is no measure {item!r}; there are {', '.join(MEASURES)}.")
    return MEASURES[item]()


def capture(*measures: str | Measure) -> tuple[str | Statistic, ...]:
    """What to give to ``capture=``: the statistics and fields that measures are made of.

    Args:
        measures: names or objects; none: all that can be computed beside the kernel.

    Raises:
        SelectionError: there is no such measure.
    """
    chosen = resolve(measures) if measures else [m for m in map(_one, MEASURES) if m.statistics and not m.reads]
    return tuple({x if isinstance(x, str) else x.key: x for m in chosen for x in m.capture}.values())
