"""What is known of the tensors of an attention written out by hand: scores, exponentials, weights, sums of values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .axis_history import Atom, Origin
from .entries import Entries
from .products import Label, Product


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
    entries: Entries | None = None  # where they are not as the product made them
    finite: tuple[Tensor, int, Origin] | None = None  # the model's own scores before any term or mask was joined

    def but(self, **changes: Any) -> Scores:
        """A copy with changes."""
        return replace(self, **changes)


@dataclass(slots=True)
class Part(State):
    """A slice of scores: writing to it writes to them."""

    of: Scores = None  # type: ignore[assignment]
    entries: Entries | None = None


@dataclass(slots=True)
class Lost(State):
    """Scores that were moved about, or went where they cannot be followed; ``why`` says where."""

    why: str = ""
    entries: Entries | None = None  # where each came from, as long as that can be followed
    scales: dict[int, float] = field(default_factory=dict)  # by the id of the product
    opaque: bool = False


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
class Root:
    """A softmax over scores that were moved about: its argument, where that came from, and its result."""

    scores: Tensor
    out: Tensor
    dim: int
    entries: Entries
    scale: float
    opaque: bool
    use: Use
    version: int  # of the argument
    scored: Any = None  # what was worked out of it


@dataclass(slots=True)
class Spread(State):
    """Weights of a softmax over scores that were moved about; they may be moved about too."""

    root: Root = None  # type: ignore[assignment]
    entries: Entries = None  # type: ignore[assignment]
    own: tuple[Tensor, Entries] | None = None  # before dropout
    dropout: float = 0.0


@dataclass(slots=True)
class Met:
    """A product of such weights with values."""

    entries: Entries
    weights: Tensor
    w_labels: Sequence[Label]
    v: Tensor
    v_labels: Sequence[Label]
    out: Tensor
    out_labels: Sequence[Label]
    own: tuple[Tensor, Entries] | None
    dropout: float
    version: int  # of the weights


@dataclass(slots=True)
class Gathered(State):
    """Values that such weights have gathered, added up; ``entries``: of each of the products' results."""

    root: Root = None  # type: ignore[assignment]
    uses: list[Met] = field(default_factory=list)
    entries: list[Entries] = field(default_factory=list)


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
