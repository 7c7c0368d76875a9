"""What heads do in a sequence that says a segment twice: the usual test is one of random tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ... import checks
from ... import statistics as st
from ...calls.key_tokens import has_tokens
from ...errors import MeasureError
from ..call_view import View
from ..labels import PADDING, Rows, as_label_rows, key_labels, with_padding_marked
from ..table import measure_table
from .base import Measure

if TYPE_CHECKING:
    from pandas import DataFrame

    from ...traces import TraceLike

KINDS = ("induction", "duplicate_token", "previous_token")


@dataclass(frozen=True)
class RepeatedSegment(Measure):
    """The mean weight of the queries of the second copy on one key, with period P (Olsson et al. 2022).

    ``induction``: on i − P + 1, what came after the token in the first copy; ``duplicate_token``: on i − P;
    ``previous_token``: on i − 1. The queries are those of the longest run of tokens that are as P places before.

    Args:
        score: which.
        period: P; None: it is found from the tokens, the P whose run is the longest and at least P long.
        tokens: strings or ids, one list, or one for each batch entry; None: the tokens of the trace. With neither, the
            queries are all those from ``period`` on.

    Raises:
        MeasureError: an unknown score, or a period that is no positive int.
    """

    name: ClassVar[str] = "repeated_segment"
    unit: ClassVar[str] = "share"
    positional: ClassVar[bool] = True
    score: str = "induction"
    period: int | None = None
    tokens: Rows | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.tokens is not None:
            object.__setattr__(self, "tokens", as_label_rows(self.tokens, f"{self.name}: tokens"))
        checks.word("RepeatedSegment: score", self.score, KINDS, MeasureError)
        if self.period is not None:
            period = checks.whole("RepeatedSegment: period", self.period, 1, error=MeasureError)
            object.__setattr__(self, "period", period)

    @property
    def statistics(self) -> tuple[st.Statistic, ...]:
        """See :class:`Measure`; with a period that has to be found, the weights are needed."""
        return () if self.period is None else (st.OffsetMass(self._offset(self.period)),)

    def _offset(self, period: int) -> int:
        return {"induction": 1 - period, "duplicate_token": -period, "previous_token": -1}[self.score]

    def problem(self, view: View) -> str | None:
        """See :class:`Measure`."""
        why = super().problem(view) or view.lost
        if why is not None or (self.tokens is None and self.period is not None and not has_tokens(view.trace)):
            return why
        found = key_labels(view, self.tokens)
        if isinstance(found, str):
            return found
        if self.period is None and any(period == 0 for period, _ in self._runs(view)):
            return "no segment of the tokens is said twice in a row; period= can say where to look"
        return None

    def _runs(self, view: View) -> list[tuple[int, range]]:
        """Of each batch entry the period (0: none), and the places of the second copy."""

        def make() -> list[tuple[int, range]]:
            if self.tokens is None and self.period is not None and view.trace.tokens is None:
                first = view.keys.byte().argmax(-1).tolist()  # of what is padded on the left, the period begins later
                return [(self.period, range(start + self.period, view.shape[3])) for start in first]
            rows = key_labels(view, self.tokens)
            assert not isinstance(rows, str)
            return [_repeated_run(row, self.period) for row in with_padding_marked(view, rows)]

        return view.once((self.name, self.period, self.tokens), make)

    def rows(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        runs = self._runs(view)
        made = torch.zeros(view.shape[:3], device=view.rows.device)
        for i, (period, _) in enumerate(runs):
            made[i] = view.stat(st.OffsetMass(self._offset(period)))[i]
        return made

    def counted(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        assert view.positions is not None
        at = view.positions.expand(view.shape[0], -1)
        ends = torch.tensor([(run.start, run.stop) for _, run in self._runs(view)], device=at.device)
        return view.rows & (at >= ends[:, :1]) & (at < ends[:, 1:])


def repeated_segment(trace: TraceLike, period: int | None = None, *, tokens: Any = None, real: Any = None) -> DataFrame:
    """All scores of :class:`RepeatedSegment` in one table, as columns ``induction``, ``duplicate_token``, …

    Args:
        trace: with weights; or, for a period that is given, the statistics ``OffsetMass`` of the three offsets.
        period: P; None: found.
        tokens: strings or ids, one list, or one for each batch entry; None: the tokens of the trace.
        real: bool or 0/1, B S: True = a real token, no padding.

    Raises:
        MeasureError, FieldNotCaptured: see :func:`hookattn.analyze.measure`.
    """
    chosen = {kind: RepeatedSegment(kind, period, tokens) for kind in KINDS}
    table = measure_table(trace, list(chosen.values()), real=real)
    table = table.rename(columns={m.key: kind for kind, m in chosen.items()})
    table.attrs["units"] = dict.fromkeys(KINDS, RepeatedSegment.unit)
    return table


@lru_cache(maxsize=256)
def _repeated_run(tokens: tuple[Any, ...], period: int | None) -> tuple[int, range]:
    """The period, and the longest run of places that are as those a period before; period 0 where there is none."""
    numbers: dict[Any, int] = {}
    # Padding has a number of its own at each place, so that it repeats nothing.
    ids = np.array([-1 - i if x == PADDING else numbers.setdefault(x, len(numbers)) for i, x in enumerate(tokens)])
    best, found = range(0), 0
    for p in range(1, len(ids) // 2 + 1) if period is None else (period,):
        # Runs of tokens that are as p places before lie between two breaks; sentinels stand at both ends.
        breaks = np.flatnonzero(np.concatenate([[True], ids[p:] != ids[:-p], [True]]))
        lengths = np.diff(breaks) - 1
        if not lengths.size:
            continue
        longest = int(lengths.argmax())
        start, n = p + int(breaks[longest]), int(lengths[longest])
        if n > len(best) and (period is not None or n >= p):
            best, found = range(start, start + n), p
    return (found if period is None else period), best
