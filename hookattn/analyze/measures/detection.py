"""How well a head fits a known pattern, as TransformerLens scores it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import checks
from ...errors import MeasureError
from ..call_view import View
from ..pairs import PairMass
from ..reading import Reading
from .base import Measure
from .repeats import earlier

PATTERNS = ("previous_token_head", "duplicate_token_head", "induction_head")
ERRORS = ("mul", "abs")


@dataclass(frozen=True)
class Detection(PairMass):
    """The score of ``transformer_lens.head_detector.detect_head``, for any model.

    With A the weights and D the pattern, 1 where the head is meant to look and else 0, over the n queries that count:
    ``mul`` is ``Σ A∘D / Σ A``, and ``abs`` is ``1 − Σ |A − D| / n`` (there rounded to three digits). D of query i is 1
    at i − 1 (``previous_token_head``), at all j < i with the same token (``duplicate_token_head``), or at all j + 1 of
    these (``induction_head``). A batch is scored as one: ``mul`` as the ratio of the sums.

    Args:
        tokens: see :class:`PairMass`; the previous token needs none.
        pattern: which.
        error: ``"mul"`` or ``"abs"``.
        exclude_bos: leave out the first key that is no padding.
        exclude_current_token: leave out the key that is the query's own place.

    Raises:
        MeasureError: an unknown pattern or error.
    """

    name: ClassVar[str] = "detection"
    pattern: str = "induction_head"
    reachable: ClassVar[bool] = False
    error: str = "mul"
    exclude_bos: bool = False
    exclude_current_token: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.word("Detection: pattern", self.pattern, PATTERNS, MeasureError)
        checks.word("Detection: error", self.error, ERRORS, MeasureError)
        checks.flag("Detection: exclude_bos", self.exclude_bos, MeasureError)
        checks.flag("Detection: exclude_current_token", self.exclude_current_token, MeasureError)

    def problem(self, view: View) -> str | None:
        """See :class:`Measure`."""
        if self.pattern == PATTERNS[0]:
            return Measure.problem(self, view)  # it needs no tokens
        return super().problem(view)

    def related(self, tokens: tuple[Any, ...]) -> Tensor:
        """See :class:`PairMass`."""
        same = earlier(tokens)
        return same if self.pattern == PATTERNS[1] else same + torch.tensor([[0], [1]])

    def places(self, view: View) -> list[Tensor]:
        """See :class:`PairMass`."""
        if self.pattern != PATTERNS[0]:
            return super().places(view)
        b, _, _, s = view.shape
        keys = torch.arange(s - 1)
        return [torch.stack([keys + 1, keys])] * b

    def read(self, view: View) -> Reading:
        """See :class:`Measure`."""
        b, _, t, s = view.shape
        pairs, at = self.pairs(view), view.positions
        assert at is not None
        drop = ~view.rows.unsqueeze(-1).expand(b, t, s)
        if self.exclude_bos:
            drop = drop.clone()
            drop[torch.arange(b), :, view.keys.byte().argmax(-1)] = True
        if self.exclude_current_token:
            drop = drop | (at.unsqueeze(-1) == torch.arange(s, device=at.device))
        weights = view.weights.masked_fill(drop.unsqueeze(1), 0.0)
        total = weights.sum((2, 3), dtype=torch.float64)
        along = weights[pairs.example, :, pairs.row, pairs.key].double()
        hits = torch.zeros_like(total).index_add_(0, pairs.example, along)
        if self.error == "mul":
            return Reading(torch.where(total > 0, hits / total, torch.nan), total)
        # |A − D| summed is Σ A + Σ D − 2 Σ A∘D, as D is 0 or 1 and A at most 1: no matrix D is formed.
        wanted = pairs.example[~drop[pairs.example, pairs.row, pairs.key]].bincount(minlength=b).unsqueeze(1)
        queries = view.rows.sum(-1)
        return Reading(1 - (total + wanted - 2 * hits) / queries.unsqueeze(1), queries)
