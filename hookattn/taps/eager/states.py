"""The states of a tensor between q·k and the output: scores, exponentials, weights, sums of values.

The package's docstring has the order in which they come. "Scattered" is what does not lie as queries by keys.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...attention.kernel_call import DOT
from ...attention.normalizers import SOFTMAX
from .axis_history import Atom, Origin
from .entries import Entries
from .products import Label, Product

_MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda x: x.bool(),
    "not": lambda x: ~x.bool(),
    "zero": lambda x: x == 0,
    "inverse": lambda x: x.reciprocal(),
}


@dataclass(slots=True)
class Term:
    """A tensor that was joined to the scores: a bias, a mask, a factor for each head.

    Attributes:
        tensor: the tensor, which broadcasts against the scores.
        origin: the scores' axes at that moment.
        factor: what the tensor is multiplied by.
        how: what is made of it: nothing else, ``bool``, ``not``, ``zero`` (where it is 0) or ``inverse``. Said and not
            done, so that a run of the same operations is known to need the same tensors.
    """

    tensor: Tensor
    origin: Origin
    factor: float = 1.0
    how: str = ""

    def value(self, x: Tensor) -> Tensor:
        """What joined the scores, of the tensor or of that of another run."""
        return x if not self.how else _MADE[self.how](x)


@dataclass(slots=True)
class State:
    """What a tensor is to an attention.

    Attributes:
        origin: where the tensor's axes come from.
        version: how often the tensor had been written to when the state was set.
    """

    origin: Origin
    version: int = -1


class Step(NamedTuple):
    """An operation between scores and weights.

    Attributes:
        name: its name, without underscores.
        by: the number that is its other operand, if that is one.
        of_rows: its other operand is one number for each row, made of the scores themselves: their sum, say.
    """

    name: str
    by: float | None = None
    of_rows: bool = False


@dataclass(slots=True)
class Scores(State):
    """``cap·tanh(scale·factors·a·b/cap) + terms − shifts``, with ``fills`` overwritten by something very negative.

    Every product of two tensors is taken for scores at first, and forgotten with its tensor if no softmax runs over it.

    Attributes:
        product: ``a·b``.
        scale: a number that it is multiplied by.
        factors: tensors that it is multiplied by, one number for each matrix.
        cap: the soft cap; None: there is none.
        terms: what is added: biases, and masks of numbers.
        fills: masks, True where a score is overwritten.
        shifts: what is subtracted from every score of a row, and leaves the weights as they are.
        sink: a column that was joined to them, which takes part in the softmax and has no value.
        sink_first: whether it lies before those of the keys; else after them.
        opaque: the operations that were not understood; the scores are then read off the model's own tensor.
        entries: which score of ``a·b`` each entry is, once they were moved about; None: the tensor is ``a·b``'s.
        finite: the model's own scores before any term or mask joined them, their version and their axes.
        score: what they are: ``dot``, or what was seen in place of q·k, which is then opaque.
        composed: an operand of the product is weights, or such a product itself: no product of queries and keys.
        chained: an operand of the product is a product of two activations.
        before: the scores before the first operation that may have made weights of them; None: there was none.
        steps: that operation, and all since.
        held: the model's own tensor of them, its version and its axes, where its values may have to be read.
        dropped: where they went through a dropout: what they were before it, their axes, and its probability.
    """

    product: Product = None  # type: ignore[assignment]
    scale: float = 1.0
    factors: list[Term] = field(default_factory=list)
    cap: float | None = None
    terms: list[Term] = field(default_factory=list)
    fills: list[Term] = field(default_factory=list)
    shifts: list[Tensor | float] = field(default_factory=list)
    sink: Tensor | None = None
    sink_first: bool = False
    opaque: list[str] = field(default_factory=list)
    entries: Entries | None = None
    finite: tuple[Tensor, int, Origin] | None = None
    score: str = DOT
    composed: bool = False
    chained: bool = False
    before: Scores | None = None
    steps: list[Step] = field(default_factory=list)
    held: tuple[Tensor, int, Origin] | None = None
    dropped: tuple[Tensor, Origin, float] | None = None

    def but(self, **changes: Any) -> Scores:
        """A copy with changes."""
        return replace(self, **changes)


@dataclass(slots=True)
class Pairwise(State):
    """Two tensors broadcast against each other, each with an axis of its own and with a width that both have.

    Attributes:
        a, b: the operands, without the axes that only the other has.
        labels_a, labels_b: the labels of their axes: the number of a dimension of the pairs as they were made.
        origins: where the operands' axes come from.
        dims: the labels of the dimensions.
        how: the operation that paired them: ``mul``, ``add``, ``sub`` or ``div``.
        scale: a number that they were multiplied by.
        steps: what else was done to them.
        summed: the dimensions, other than the width, that this is their sum over.
        cut: whether they are some of all pairs only.
    """

    a: Tensor = None  # type: ignore[assignment]
    b: Tensor = None  # type: ignore[assignment]
    labels_a: list[int] = field(default_factory=list)
    labels_b: list[int] = field(default_factory=list)
    origins: tuple[Origin, Origin] = None  # type: ignore[assignment]
    dims: list[int] = field(default_factory=list)
    how: str = "mul"
    scale: float = 1.0
    steps: list[str] = field(default_factory=list)
    summed: list[int] = field(default_factory=list)
    cut: bool = False

    def but(self, **changes: Any) -> Pairwise:
        """A copy with changes."""
        return replace(self, **changes)


@dataclass(slots=True)
class WeightedValues(State):
    """Values, each times its weight, before they are summed over the keys.

    Attributes:
        weights: the weights' tensor, without the axes that only the values have.
        state: what the weights are: weights, or scores that meet the values as they are.
        labels: those of the weights' axes: the number of a dimension of the product.
        v, v_labels: the values.
        summed: the dimensions that they were summed over; empty: they were not yet.
    """

    weights: Tensor = None  # type: ignore[assignment]
    state: Any = None
    labels: list[int] = field(default_factory=list)
    v: Tensor = None  # type: ignore[assignment]
    v_labels: list[int] = field(default_factory=list)
    summed: list[int] = field(default_factory=list)


@dataclass(slots=True)
class ScoresSlice(State):
    """A slice of scores.

    Attributes:
        of: the scores; a write to the slice writes to them.
        entries: which of their entries the slice has.
    """

    of: Scores = None  # type: ignore[assignment]
    entries: Entries | None = None


@dataclass(slots=True)
class ScatteredScores(State):
    """Scores that do not lie as queries by keys any more: a band, blocks in a buffer, a few keys for each query.

    Attributes:
        why: the reason that is reported if a softmax runs over them and the call can't be put together.
        entries: which score each entry is; None: that can't be told.
        scales: by the id of the product, what it was multiplied by.
        opaque: whether something else was done to them, too.
        padded: the scores with a sink that they are, if no more was done to them than that a column was put beside.
    """

    why: str = ""
    entries: Entries | None = None
    scales: dict[int, float] = field(default_factory=dict)
    opaque: bool = False
    padded: Scores | None = None


@dataclass(slots=True)
class Exponentials(State):
    """``exp`` of scores, not yet normalized."""

    of: Scores = None  # type: ignore[assignment]


@dataclass(slots=True)
class LogWeights(State):
    """``log_softmax`` of scores.

    Attributes:
        of: the scores.
        dim: the dimension that it ran over.
        extended: whether the sink's column is there.
    """

    of: Scores = None  # type: ignore[assignment]
    dim: int = -1
    extended: bool = False


@dataclass(slots=True)
class RowStatistic(State):
    """One number for each row of scores.

    Attributes:
        kind: ``max`` or ``lse`` of the scores, the ``sum`` of their exponentials, or the ``total`` of what else was
            made of them.
        of: the scores.
        dim: the dimension that it was taken over.
        extra: what was added to the sum: the exponential of a sink.
    """

    kind: str = "max"
    of: Scores = None  # type: ignore[assignment]
    dim: int = -1
    extra: Tensor | float = 0.0


@dataclass(slots=True)
class Formed:
    """What a listener was asked about weights as they were formed.

    Attributes:
        axes: tells which of the axes are what.
        normalizer: what made them.
        outweighed: of each mask that was added to the scores, whether it is none after all.
        changed: whether they were exchanged.
        edits: what the listener has noted.
    """

    axes: object
    normalizer: str
    outweighed: dict[int, bool]
    changed: bool
    edits: object = None


@dataclass(slots=True)
class SoftmaxUse:
    """What became of the result of one softmax; shared by all views and slices of the result.

    Attributes:
        path: the module in which the softmax ran.
        done: whether a call was recorded, or it was said why not.
        why: what is reported if neither happens.
        formed: what a listener was asked about them, and noted; None: it was not asked.
    """

    path: str | None
    done: bool = False
    why: str = "softmax over q·k whose result was never multiplied with values"
    formed: Formed | None = None


class Instead(NamedTuple):
    """What an operand was exchanged for that was found to be weights only as it met values; by itself, if by nothing.

    Attributes:
        of: the model's own.
        version: how often that had been written to.
        tensor: what takes its place.
        use: what becomes of it.
    """

    of: weakref.ref[Tensor]
    version: int
    tensor: Tensor
    use: SoftmaxUse


@dataclass(slots=True)
class Weights(State):
    """Weights: the result of a softmax over one dimension.

    Attributes:
        scores: what it ran over; None: something that is not known to be scores.
        scores_origin: the scores' axes at that moment.
        dim: the scores' dimension that it ran over.
        own: the weights before dropout or mixing, and their axes; None: neither happened.
        scores_tensor: the argument of the softmax, kept where it has to be read.
        extended: whether the sink's column is still there.
        dropout: the probability of the dropout that they went through.
        mixed: the operations that changed them otherwise.
        use: what becomes of them.
        dtype: that the softmax ran in.
        key_range: the keys that this is a slice of, first and past the last; None: all.
        why: the reason that is reported where ``scores`` is None.
        normalizer: what made them.
        entries: where they are the weights of some of the heads: which of them, and of which tensor.
        joined: the weights of other softmaxes that these were added to or subtracted from, as they were then.
        read: how often ``scores_tensor`` had been written to.
        met: values of the same shape that they were multiplied by, where a softmax gave each feature a weight.
        steps: the operations that made them, where it was no softmax; None: it was one.
    """

    scores: Scores | None = None
    scores_origin: Origin | None = None
    dim: int = -1
    own: tuple[Tensor, Origin] | None = None
    scores_tensor: Tensor | None = None
    extended: bool = False
    dropout: float = 0.0
    mixed: list[str] = field(default_factory=list)
    use: SoftmaxUse | None = None
    dtype: torch.dtype | None = None
    key_range: tuple[int, int] | None = None
    why: str = ""
    normalizer: str = SOFTMAX
    steps: list[Step] | None = None
    entries: Entries | None = None
    joined: list[tuple[Weights, Tensor]] = field(default_factory=list)
    read: int = -1
    met: Tensor | None = None

    @property
    def keys_dim(self) -> int | None:
        """The dimension that holds the keys now; None where they are spread over several, or it can't be told."""
        if self.scores is None or self.scores_origin is None:
            return None
        keys = {a for x in self.scores_origin.layout()[self.dim] for a in (x, *x.lineage())}
        layout = self.origin.layout()
        found = [i for i, dim in enumerate(layout) if any(a in keys or keys & {*a.lineage()} for a in dim)]
        return found[0] if len(found) == 1 else None

    def but(self, **changes: Any) -> Weights:
        """A copy with changes."""
        return replace(self, **changes)


@dataclass(slots=True)
class TopScores(State):
    """The largest scores of each row, or the softmax of them.

    Attributes:
        of: the scores.
        held: the model's own tensor of them.
        index: the keys of which they are.
        dim: the dimension that they were picked along.
        weights: whether the softmax ran over them.
        use: what becomes of its result.
    """

    of: Scores = None  # type: ignore[assignment]
    held: Tensor = None  # type: ignore[assignment]
    index: Tensor = None  # type: ignore[assignment]
    dim: int = -1
    weights: bool = False
    use: SoftmaxUse | None = None


@dataclass(slots=True)
class ScatteredSoftmax:
    """A softmax over scattered scores.

    Attributes:
        scores: its argument.
        out: its result.
        dim: the dimension that it ran over.
        entries: which score each entry of the argument is.
        scale: what ``a·b`` was multiplied by.
        opaque: whether something else was done to it, too.
        use: what becomes of the result.
        version: how often the argument had been written to.
        layout: which query and which key each entry is of (:class:`.scattered_layout.ScatteredLayout`), worked out once
            a product with values shows that it is worth it.
    """

    scores: Tensor
    out: Tensor
    dim: int
    entries: Entries
    scale: float
    opaque: bool
    use: SoftmaxUse
    version: int
    layout: Any = None


@dataclass(slots=True)
class ScatteredWeights(State):
    """The result of a softmax over scattered scores, which may be moved about itself.

    Attributes:
        root: the softmax.
        entries: which entry of its result each entry is.
        own: the weights before dropout, and their entries; None: there was none.
        dropout: its probability.
    """

    root: ScatteredSoftmax = None  # type: ignore[assignment]
    entries: Entries = None  # type: ignore[assignment]
    own: tuple[Tensor, Entries] | None = None
    dropout: float = 0.0


@dataclass(slots=True)
class ScatteredValueProduct:
    """A product of scattered weights with values.

    Attributes:
        entries: which entry of the softmax each weight is.
        weights, w_labels: the weights and the labels of their axes.
        v, v_labels: the values.
        out, out_labels: the result.
        own: the weights before dropout, and their entries.
        dropout: its probability.
        version: how often the weights had been written to.
    """

    entries: Entries
    weights: Tensor
    w_labels: Sequence[Label]
    v: Tensor
    v_labels: Sequence[Label]
    out: Tensor
    out_labels: Sequence[Label]
    own: tuple[Tensor, Entries] | None
    dropout: float
    version: int


@dataclass(slots=True)
class ScatteredOutput(State):
    """The sum of some products of scattered weights with values; the output once every weight has met its value.

    Attributes:
        root: the softmax that the weights are of.
        uses: the products.
        entries: for each product, which entry of its result each entry is.
    """

    root: ScatteredSoftmax = None  # type: ignore[assignment]
    uses: list[ScatteredValueProduct] = field(default_factory=list)
    entries: list[Entries] = field(default_factory=list)


@dataclass(slots=True)
class ValueProduct:
    """``weights · v``.

    Attributes:
        weights, weights_labels, weights_origin: the weights, the labels of their axes, and where those come from.
        v, v_labels, v_origin: the values.
        out, out_labels: the result; None: it is not there yet.
        width: those of the result's axes that are the values' alone.
    """

    weights: Tensor
    weights_labels: Sequence[Label]
    weights_origin: Origin
    v: Tensor
    v_labels: Sequence[Label]
    v_origin: Origin
    out: Tensor | None
    out_labels: Sequence[Label]
    width: tuple[Atom, ...] = ()


@dataclass(slots=True)
class PartialOutput(State):
    """Values weighted by slices of the weights of one softmax, added up; the output once the slices are all keys.

    Attributes:
        parts: the slices of the weights, and their products with values.
    """

    parts: list[tuple[Weights, ValueProduct]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the slices are all of the keys, each once."""
        state = self.parts[0][0]
        assert state.scores_origin is not None
        spans = sorted(w.key_range for w, _ in self.parts if w.key_range is not None)
        together = all(a[1] == b[0] for a, b in pairwise(spans))
        return together and spans[-1][1] - spans[0][0] == state.scores_origin.shape[state.dim] - state.extended


@dataclass(slots=True)
class Unnormalized(State):
    """Values weighted by exponentials of scores, or by the softmax of each of several blocks of keys, and added up.

    Attributes:
        parts: the weights of each block, and their product with values.
        use: what becomes of them.
        sink: the logit of what was added to the sum that they were divided by.
        normalized: whether each block was divided by its own sum.
        scaled: whether rows were multiplied or divided by numbers.
        started: whether they were added to something before them.
    """

    parts: list[tuple[Weights, ValueProduct]] = field(default_factory=list)
    use: SoftmaxUse | None = None
    sink: Tensor | None = None
    normalized: bool = False
    scaled: bool = False
    started: bool = False
