"""How far back, or ahead, a head looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ... import statistics as st
from ..call_view import View
from .base import Measure


@dataclass(frozen=True)
class MeanDistance(Measure):
    """``Σ_j w_ij |i − j| / Σ_j w_ij`` in keys, the mean over the queries (Vig & Belinkov 2019).

    The divisor is 1 but for sinks, which have no distance. (S − 1) / 4 for uniform causal attention.
    """

    name: ClassVar[str] = "mean_distance"
    unit: ClassVar[str] = "keys"
    positional: ClassVar[bool] = True

    @property
    def statistics(self) -> tuple[st.Statistic, ...]:
        """See :class:`Measure`."""
        return (st.MeanDistance(),)

    def rows(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        return view.stat(st.MeanDistance())
