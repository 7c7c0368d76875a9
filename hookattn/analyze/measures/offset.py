"""Heads that look a fixed number of tokens away."""

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
class AtOffset(Measure):
    """``w_{i, i+offset}``, the mean over the queries; 0 for a query that has no such key.

    A perfect previous-token head scores (S − 1) / S, since the first token has no token before it.
    """

    name: ClassVar[str] = "at_offset"
    unit: ClassVar[str] = "share"
    positional: ClassVar[bool] = True
    offset: int = -1

    def __post_init__(self) -> None:
        offset = checks.whole(f"{type(self).__name__}: offset", self.offset, error=MeasureError)
        object.__setattr__(self, "offset", offset)

    @property
    def statistics(self) -> tuple[st.Statistic, ...]:
        """See :class:`Measure`."""
        return (st.OffsetMass(self.offset),)

    def rows(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        return view.stat(*self.statistics)


@dataclass(frozen=True)
class PreviousToken(AtOffset):
    """:class:`AtOffset` −1 (Voita et al. 2019; Elhage et al. 2021)."""

    name: ClassVar[str] = "previous_token"


@dataclass(frozen=True)
class NextToken(AtOffset):
    """:class:`AtOffset` 1."""

    name: ClassVar[str] = "next_token"
    offset: int = 1


@dataclass(frozen=True)
class SelfToken(AtOffset):
    """:class:`AtOffset` 0: the token itself."""

    name: ClassVar[str] = "self_token"
    offset: int = 0
