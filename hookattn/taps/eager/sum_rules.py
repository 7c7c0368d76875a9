"""What an operation makes of sums of values that are not divided by the sum of their weights yet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .operation import Operation, number, same_state
from .states import RowStatistic, SoftmaxUse, State, Unnormalized
from .weight_rules import sink_of


def scaled_sums(c: Operation) -> State | None:
    """Sums of values times or divided by a number or by one number for each row."""
    state: Unnormalized = c.state
    if not isinstance(c.out, Tensor) or c.out.shape != c.x.shape or (c.kind.arithmetic == "div" and c.position != 0):
        return None
    other = c.other()
    if number(other) is None and not (isinstance(other, Tensor) and _one_for_each_row(state, c.x, other)):
        return None
    stat, sink = c.look(other), state.sink
    if isinstance(stat, RowStatistic) and stat.kind == "sum" and len(state.parts) == 1:
        sink = sink_of(stat, c.x)
    return _replaced(state, origin=c.origin, sink=sink, scaled=True)


def _one_for_each_row(state: Unnormalized, x: Tensor, other: Tensor) -> bool:
    """Whether a tensor that sums are multiplied with has no number of its own for any element of a vector."""
    use = state.parts[0][1]
    width = [i for i, label in enumerate(use.out_labels) if label not in use.weights_labels]
    if not other.dim() or len(use.out_labels) != x.dim():
        return False
    at = [i - x.dim() + other.dim() for i in width]
    return all(i < 0 or other.shape[i] == 1 for i in at)


def added_sums(c: Operation) -> State | None:
    """Sums of values of some keys and of others."""
    state: Unnormalized = c.state
    other = c.other()
    if not isinstance(c.out, Tensor) or c.out.shape not in (c.x.shape, getattr(other, "shape", None)):
        return None
    mine = c.look(other)
    if number(other) == 0:  # as ``sum`` begins
        return _replaced(state, origin=c.origin)
    if isinstance(mine, Unnormalized):
        _replaced(mine)
        return _replaced(state, origin=c.origin, parts=[*state.parts, *mine.parts])
    # What blocks are added to at first: zeros, whatever they were multiplied by. The rows that are computed will tell.
    starts = isinstance(other, Tensor) and mine is None and other.shape == c.x.shape and not state.started
    return _replaced(state, origin=c.origin, started=True) if starts else None


def _replaced(state: Unnormalized, **changes: Any) -> Unnormalized:
    """What became of sums, in whose place it is from now on."""
    assert state.use is not None
    state.use.done = True
    return replace(state, use=SoftmaxUse(state.use.path), **changes)


def kept_sums(c: Operation) -> State | None:
    """A cast or a copy."""
    return same_state(c)
