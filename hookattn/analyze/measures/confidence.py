"""How sure a head is of the one key it looks at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ... import statistics as st
from ..call_view import View
from .base import Measure


@dataclass(frozen=True)
class Confidence(Measure):
    """``max_j w_j``, the mean over the queries (Voita et al. 2019).

    They leave out the end-of-sentence token as a query; ``real=`` can say that it is none.
    """

    name: ClassVar[str] = "confidence"
    unit: ClassVar[str] = "share"

    @property
    def statistics(self) -> tuple[st.Statistic, ...]:
        """See :class:`Measure`."""
        return (st.MaxScore(), st.LogSumExp())

    def rows(self, view: View) -> Tensor:
        """As ``exp(largest score − log-sum-exp)``."""
        top = view.stat(st.MaxScore())
        return torch.where(top.isneginf(), 0.0, (top - view.stat(st.LogSumExp())).exp())
