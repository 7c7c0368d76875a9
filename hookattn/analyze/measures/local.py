"""Whether a head looks near or far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ... import checks
from ... import statistics as st
from ...errors import MeasureError
from ..call_view import View
from .base import Measure


@dataclass(frozen=True)
class LocalMass(Measure):
    """Local concentration: ``Σ_{|i − j| < window} w_ij``, the mean over the queries."""

    name: ClassVar[str] = "local_mass"
    unit: ClassVar[str] = "share"
    positional: ClassVar[bool] = True
    window: int = 4

    def __post_init__(self) -> None:
        window = checks.whole(f"{type(self).__name__}: window", self.window, 1, error=MeasureError)
        object.__setattr__(self, "window", window)

    @property
    def statistics(self) -> tuple[st.Statistic, ...]:
        """See :class:`Measure`."""
        return (st.LocalMass(self.window),)

    def rows(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        return view.stat(*self.statistics)


@dataclass(frozen=True)
class GlobalSpread(LocalMass):
    """Global spread: ``Σ_{|i − j| ≥ window} w_ij``, the mean over the queries; what goes to sinks is in neither."""

    name: ClassVar[str] = "global_spread"

    @property
    def statistics(self) -> tuple[st.Statistic, ...]:
        """See :class:`Measure`."""
        return (st.FarMass(self.window),)
