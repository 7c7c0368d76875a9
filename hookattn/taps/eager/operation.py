"""One operation on a tensor that is part of an attention, and what the table of operations says of its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from ...torch_internals.transforms import stands_for_others
from .axis_history import Origin
from .decisions import decide
from .entries import Entries
from .states import ScatteredScores, ScatteredWeights, Scores, ScoresSlice, State, Weights
from .view_rules import AxesRule, same_axes

Rule = Callable[["Operation"], State | None]
EntriesOf = Callable[[Any], Entries | None]
EntriesRule = Callable[["Operation", EntriesOf], Entries | None]


@dataclass(frozen=True, slots=True)
class OperationKind:
    """A row of the table of operations (:mod:`.operations`); the defaults are those of an operation that has no row.

    Attributes:
        axes: how the axes of the result come from those of the first argument.
        entries: which entry of the arguments each entry of the result is; None: it may be none of them.
        rules: by the state of the argument that is followed, what the state of the result is.
        arithmetic: which of the four operations it is, on entries that lie at the same place.
        pairs: of two operands with an axis each that the other lacks it makes something of every pair.
        moves_scores: a softmax over the result is still a softmax over scores, which may lie elsewhere.
        shuffles: the result has the argument's shape and not its places, so that the shape proves nothing.
        sums_axis: an axis of the argument is summed over, and another of any extent put in its place.
        product: it multiplies two tensors and sums over an axis of both.
        softmax: it is a softmax over one dimension.
        drops_out: it sets entries to 0 at random.
        operand: the place of the argument whose axes the result has; None: whichever has the shape of the result.
        pours: it writes its last argument into its first.
        joins: its first argument is a sequence of tensors that are laid end to end.
        splits: its result is a sequence of pieces of its first argument.
        ignored: its result is nothing worth following.
    """

    axes: AxesRule = same_axes
    entries: EntriesRule | None = None
    rules: Mapping[type[State], Rule] = field(default_factory=dict)
    arithmetic: Literal["mul", "div", "add", "sub"] | None = None
    pairs: bool = False
    moves_scores: bool = False
    shuffles: bool = False
    sums_axis: bool = False
    product: bool = False
    softmax: bool = False
    drops_out: bool = False
    operand: int | None = None
    pours: bool = False
    joins: bool = False
    splits: bool = False
    ignored: bool = False


@dataclass(slots=True)
class Operation:
    """One operation that ran on a tensor with a state.

    Attributes:
        name: its name, as :func:`.operations.name_of` gives it.
        kind: its row in the table.
        func: the function itself.
        args: its arguments.
        kwargs: its keyword arguments.
        x: the argument that is followed; of an operation in place, what was written to.
        position: its place among the arguments.
        state: its state.
        out: the result.
        origin: where the axes of the result come from.
        look: the state of a tensor.
        keep_finite: whether the model's own scores are wanted, as they are before a mask joins them.
        results: all that it returned, where that is several.
    """

    name: str
    kind: OperationKind
    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    x: Tensor
    position: int
    state: Any
    out: Any
    origin: Origin
    look: Callable[[Any], State | None]
    keep_finite: bool
    results: Any = None

    def moved(self, of: EntriesOf | None = None) -> Entries | None:
        """Where the entries of the result came from; None where that can't be told.

        Args:
            of: where the entries of an argument came from; None: by its state.
        """
        return None if self.kind.entries is None else self.kind.entries(self, of or self.entries)

    def entries(self, x: Any) -> Entries | None:
        """Where the entries of a tensor came from, by its state."""
        return entries_of(self.look(x), x)

    def other(self, name: str = "other") -> Any:
        """The other operand of a binary operation."""
        return self.kwargs[name] if name in self.kwargs else self.args[1 - self.position]

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.kwargs.get(name, self.args[index] if len(self.args) > index else default)


def number(value: Any) -> float | None:
    """A Python number, or the value of a one-element tensor; None for anything else."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Tensor) and value.dim() == 0 and not stands_for_others(value):
        return float(decide(Tensor.item, value))
    return None


def entries_of(state: State | None, x: Any) -> Entries | None:
    """Where the entries of a tensor with a state came from."""
    if isinstance(state, Scores):
        # Entries say which score each is, and nothing of what else is in it: a sink, a cap, a factor of its own.
        if state.sink is not None or state.cap is not None or state.factors or state.product.learned:
            return None
        return state.entries or Entries(source=state.product, shape=tuple(x.shape))
    return state.entries if isinstance(state, (ScoresSlice, ScatteredScores, ScatteredWeights, Weights)) else None


def same_state(c: Operation) -> State | None:
    """A view or a cast: the same state under the result's axes."""
    state: State = c.state
    if isinstance(state, Weights) and state.entries is not None:
        return replace(state, origin=c.origin, entries=c.moved())
    if not isinstance(c.out, Tensor) or not isinstance(state, (Scores, ScoresSlice)):
        return replace(state, origin=c.origin)
    if isinstance(state, Scores) and c.out.numel() != c.x.numel():
        return ScoresSlice(c.origin, of=state, entries=c.moved())
    return replace(state, origin=c.origin, entries=c.moved())
