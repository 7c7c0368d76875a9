"""What is known of the tensors of an attention written out by hand: scores, exponentials, weights, sums of values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .axes import Atom, Origin
from .product import Label, Product


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
class Lost(State):
    """Scores that went where they cannot be followed; ``why`` says where."""

    why: str = ""


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
    """What became of the result of one softmax over scores, in whatever views and slices; ``path``: where it ran."""

    path: str | None
    done: bool = False
    why: str = "softmax over q·k whose result was never multiplied with values"


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
    share: tuple[int, int] | None = None  # the keys that this is a slice of, first and past the last
    why: str = ""  # ``scores`` is None: where they were lost


@dataclass(slots=True)
class ValueProduct:
    """``weights · v``: the operands, their labels, and the result; ``width``: those of its axes that are ``v``'s."""

    weights: Tensor
    weights_labels: Sequence[Label]
    weights_origin: Origin
    v: Tensor
    v_labels: Sequence[Label]
    v_origin: Origin
    out: Tensor
    out_labels: Sequence[Label]
    width: tuple[Atom, ...] = ()


@dataclass(slots=True)
class Sum(State):
    """Values weighted by slices of the weights of one softmax, added up."""

    parts: list[tuple[Weights, ValueProduct]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the slices are all of the keys, each once."""
        state = self.parts[0][0]
        assert state.scores_origin is not None
        spans = sorted(w.share for w, _ in self.parts if w.share is not None)
        together = all(a[1] == b[0] for a, b in pairwise(spans))
        return together and spans[-1][1] - spans[0][0] == state.scores_origin.shape[state.dim] - state.extended
