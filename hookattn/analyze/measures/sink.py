"""Where attention rests that has nothing to do: the first token, and learned sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ... import checks
from ... import statistics as st
from ...attention.functional import sink_column
from ...errors import MeasureError
from ..call_view import View
from ..reading import Reading
from .base import Measure


@dataclass(frozen=True)
class FirstToken(Measure):
    """Null attention: the weight on the first token, the mean over the queries (Vig & Belinkov 2019).

    It is α of Gu et al. 2024 for the first key, ``α_k = Σ_{i ≥ k} w_ik / (T − k + 1)``. With padding on the left it is
    the first token that is none, for which the weights are needed; in a step of a generation whose window has left the
    first token behind, the first key that is left.
    """

    name: ClassVar[str] = "first_token"
    unit: ClassVar[str] = "share"

    @property
    def statistics(self) -> tuple[st.Statistic, ...]:
        """See :class:`Measure`."""
        return (st.FirstMass(1),)

    def rows(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        if bool(view.keys[:, 0].all()):
            return view.stat(st.FirstMass(1))
        first = view.keys.byte().argmax(-1)
        return view.weights.gather(3, first.view(-1, 1, 1, 1).expand(*view.shape[:3], 1)).squeeze(-1)


@dataclass(frozen=True)
class Sink(FirstToken):
    """Whether the first token is a sink: ``α > ε``, and of many examples the share (Gu et al. 2024, with ε = 0.3)."""

    name: ClassVar[str] = "sink"
    epsilon: float = 0.3

    def __post_init__(self) -> None:
        what = "a share from 0, below 1"
        checks.number("Sink: epsilon", self.epsilon, what, lambda x: 0 <= x < 1, MeasureError)

    def read(self, view: View) -> Reading:
        """See :class:`Measure`."""
        alpha = super().read(view)
        value = torch.where(alpha.value.isnan(), torch.nan, (alpha.value > self.epsilon).double())
        return Reading(value, (alpha.count > 0).long())


@dataclass(frozen=True)
class LearnedSink(Measure):
    """What goes to learned sinks and to no key, ``exp(sink − lse) = 1 − Σ_j w_j``; 0 where there are none."""

    name: ClassVar[str] = "learned_sink"
    unit: ClassVar[str] = "share"
    reads: ClassVar[tuple[str, ...]] = ("sinks",)

    @property
    def statistics(self) -> tuple[st.Statistic, ...]:
        """See :class:`Measure`."""
        return (st.LogSumExp(),)

    def rows(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        call = view.call
        if call.has("sinks"):
            sinks = call.get("sinks")
            if sinks is None:
                return view.mask.new_zeros(view.shape[:3], dtype=torch.float32)
            # Of weights alone a log-sum-exp is up to a constant, and no sink can be held against it.
            if st.LogSumExp().key in call.fields or call.has("scores"):
                return torch.exp(sink_column(sinks).squeeze(-1) - view.stat(st.LogSumExp()))
        return (1 - view.weights.sum(-1)).clamp_min(0)
