"""What is known of the tensors of an attention written out by hand: scores, exponentials, row statistics, weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .axes import Origin
from .product import Product


@dataclass(slots=True)
class Term:
    """A tensor that was joined to the scores: the tensor, a factor, and the scores' axes at that moment."""

    tensor: Tensor
    origin: Origin
    factor: float = 1.0


@dataclass(slots=True)
class State:
    """Common to all: the axes of the tensor it belongs to, and its version when last seen."""

    origin: Origin
    version: int = -1


@dataclass(slots=True)
class Scores(State):
    """``cap·tanh(scale·a·b/cap) + terms``, with ``fills`` overwritten by something very negative."""

    product: Product = None  # type: ignore[assignment]
    scale: float = 1.0
    factors: list[Term] = field(default_factory=list)
    cap: float | None = None
    terms: list[Term] = field(default_factory=list)
    fills: list[Term] = field(default_factory=list)
    shifts: list[Tensor | float] = field(default_factory=list)  # subtracted from every score of a row
    sink: Tensor | None = None
    opaque: list[str] = field(default_factory=list)
    finite: tuple[Tensor, int, Origin] | None = None  # the model's own scores before any term or mask was joined

    def but(self, **changes: Any) -> Scores:
        """A copy with changes."""
        return replace(self, **changes)


@dataclass(slots=True)
class Part(State):
    """A slice of scores: writing to it writes to them."""

    of: Scores = None  # type: ignore[assignment]


@dataclass(slots=True)
class Exp(State):
    """``exp`` of scores, not yet normalised."""

    of: Scores = None  # type: ignore[assignment]


@dataclass(slots=True)
class LogWeights(State):
    """``log_softmax`` of scores."""

    of: Scores = None  # type: ignore[assignment]
    dim: int = -1


@dataclass(slots=True)
class RowStat(State):
    """The row maximum, logsumexp (of scores) or sum (of exponentials), plus ``extra`` in the denominator."""

    kind: str = "max"
    of: Scores = None  # type: ignore[assignment]
    dim: int = -1
    extra: Tensor | float = 0.0


@dataclass(slots=True)
class Use:
    """Whether weights, or any view of them, were multiplied with values; where they were made."""

    path: str | None
    done: bool = False


@dataclass(slots=True)
class Weights(State):
    """Post-softmax weights; ``scores`` is None where the softmax ran over something that is no product."""

    scores: Scores | None = None
    scores_origin: Origin | None = None
    dim: int = -1
    own: tuple[Tensor, Origin] | None = None  # the weights before dropout or mixing, once those have happened
    scores_tensor: Tensor | None = None  # what the softmax ran over, where that has to be read
    extended: bool = False  # still holds the sink's column
    dropout: float = 0.0
    mixed: list[str] = field(default_factory=list)
    use: Use | None = None
    dtype: torch.dtype | None = None  # that the softmax ran in
