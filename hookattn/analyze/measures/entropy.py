"""How spread out a head's attention is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ... import statistics as st
from ..call_view import View
from .base import Measure


@dataclass(frozen=True)
class Entropy(Measure):
    """``−Σ_j w_j ln w_j``, the mean over the queries, in nats (Ghader & Monz 2017; Clark et al. 2019).

    0 for a head that looks at one key; ln n for one that is uniform over n keys. What goes to sinks has no term.
    """

    name: ClassVar[str] = "entropy"
    unit: ClassVar[str] = "nats"

    @property
    def statistics(self) -> tuple[st.Statistic, ...]:
        """See :class:`Measure`."""
        return (st.Entropy(),)

    def rows(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        return view.stat(st.Entropy())


@dataclass(frozen=True)
class NormalisedEntropy(Entropy):
    """The entropy over that of uniform attention, ``H_i / ln n_i`` with n_i keys that query i may attend to: 0 to 1.

    The mean over the queries that have two keys or more: with one there is nothing to spread over.
    """

    name: ClassVar[str] = "normalised_entropy"
    unit: ClassVar[str] = "share"
    reads: ClassVar[tuple[str, ...]] = ("mask",)

    def rows(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        return view.stat(st.Entropy()) / view.allowed.clamp_min(2).log()

    def counted(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        return view.rows.unsqueeze(1) & (view.allowed > 1)
