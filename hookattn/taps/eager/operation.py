"""One operation on a tensor that is part of an attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .axis_history import Origin
from .entries import CASTS, Entries, moved
from .states import Lost, Part, Scores, Spread, State

Step = Callable[["Operation"], State | None]


@dataclass(slots=True)
class Operation:
    """One operation on a tensor that has a state."""

    name: str
    state: Any
    x: Tensor
    position: int
    out: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    origin: Origin
    look: Callable[[Any], State | None]
    keep_finite: bool
    func: Any = None

    def moved(self) -> Entries | None:
        """Where the entries of the result came from, if that can be told."""
        return moved(self.name, self.func, self.args, self.kwargs, self.x, self.position, self.out, self.entries)

    def entries(self, x: Any) -> Entries | None:
        """Where the entries of a tensor came from."""
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
    if isinstance(value, Tensor) and value.dim() == 0:
        return float(value.item())
    return None


def entries_of(state: State | None, x: Any) -> Entries | None:
    """Where the entries of a tensor with a state came from."""
    if isinstance(state, Scores):
        if state.sink is not None or state.cap is not None or state.factors or state.product.learned:
            return None
        return state.entries or Entries(source=state.product, shape=tuple(x.shape))
    return state.entries if isinstance(state, (Part, Lost, Spread)) else None


def carried(c: Operation) -> State | None:
    """A view or a cast: the same state under the result's axes."""
    state: State = c.state
    if isinstance(state, Scores) and isinstance(c.out, Tensor):
        if c.out.numel() != c.x.numel():
            return Part(c.origin, of=state, entries=c.moved())
        if c.name not in CASTS:
            return state.but(origin=c.origin, entries=c.moved())
    if isinstance(state, Part):
        return replace(state, origin=c.origin, entries=c.moved())
    return replace(state, origin=c.origin)
