"""What an operation makes of scores that are still scores after it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...attention.masks import FILL
from ...torch_internals.tensor_identity import version_of
from .axis_history import Origin
from .operation import Operation, number, same_state
from .products import mixes_heads
from .states import Exponentials, LogWeights, RowStatistic, Scores, State, Term


def opaque_scores(c: Operation) -> State | None:
    """An operation that isn't known: its result is still scores if it is shaped like them, not by coincidence."""
    state: Scores = c.state
    if isinstance(c.out, Tensor) and c.out.shape == c.x.shape and keeps_axes(c, state):
        return state.but(opaque=[*state.opaque, c.name], finite=None)
    return None


def keeps_axes(c: Operation, scores: Scores) -> bool:
    """Whether the axes of a result are those of its argument: a linear map or a convolution must mix heads."""
    if not c.kind.sums_axis:
        return True
    layout = c.state.origin.layout()
    dim = 1 if c.name.startswith("conv") else -1
    return c.position == 0 and len(layout) > 1 and mixes_heads(scores.product, layout[dim])


def multiplied(c: Operation) -> State | None:
    """Multiplication by a number, or by a factor for each head."""
    return _scaled(c, 1)


def divided(c: Operation) -> State | None:
    """Division by a number, or by a factor for each head."""
    return _scaled(c, -1) if c.position == 0 else opaque_scores(c)


def _scaled(c: Operation, sign: int) -> State | None:
    """Scores times the other operand to the power of ``sign``."""
    state: Scores = c.state
    other = c.other()
    by = number(other)
    if by is not None and by > 0 and math.isfinite(by):
        by = by**sign
        terms = [replace(t, factor=t.factor * by) for t in state.terms]
        if state.cap is None:
            return state.but(origin=c.origin, scale=state.scale * by, terms=terms, finite=None)
        return state.but(origin=c.origin, cap=state.cap * by, terms=terms, finite=None)
    plain = state.cap is None and not state.terms and not state.fills and not state.opaque
    if isinstance(other, Tensor) and plain and c.look(other) is None and other.dim() >= 2:
        layout = other.shape[-2:] == (1, 1)
        if layout:
            factor = Term(other if sign > 0 else other.reciprocal(), c.origin)
            return state.but(origin=c.origin, factors=[*state.factors, factor])
    return opaque_scores(c)


def added(c: Operation) -> State | None:
    """Addition of a tensor or number."""
    return _joined(c, 1)


def subtracted(c: Operation) -> State | None:
    """Subtraction of a tensor or number."""
    return _joined(c, -1)


def _joined(c: Operation, sign: int) -> State | None:
    """Scores plus or minus (``sign``) the other operand."""
    state: Scores = c.state
    other = c.other()
    factor = float(sign) * float(c.kwargs.get("alpha", 1))
    mine = c.look(other)
    # A softmax in steps: scores minus their logsumexp, or minus their maximum, which leaves the softmax as it is.
    if isinstance(mine, RowStatistic) and sign < 0 and c.position == 0:
        if mine.kind == "lse":
            return LogWeights(c.origin, of=state, dim=mine.dim)
        if mine.kind == "max":
            return state.but(origin=c.origin, shifts=[*state.shifts, other], finite=None)
    if c.position != 0 and sign < 0:
        return opaque_scores(c)
    # Of two products one is q·k and the other a bias, made of q and a table of relative positions, say. Such a bias was
    # gathered or shifted, and is opaque; q·k is the other, be it the second operand.
    if isinstance(mine, Scores) and mine.opaque and not state.opaque:
        pass
    elif isinstance(mine, Scores) and state.opaque and c.position == 0:
        return _joined(replace(c, state=mine, x=other, position=1), sign)
    value = number(other)
    if value is not None:
        return (
            same_state(c)
            if value == 0
            else state.but(origin=c.origin, shifts=[*state.shifts, -factor * value], finite=None)
        )
    if isinstance(c.out, Tensor) and c.out.shape != c.x.shape:
        return None
    return state.but(
        origin=c.origin, terms=[*state.terms, Term(other, c.origin, factor)], finite=state.finite or unmasked_scores(c)
    )


def unmasked_scores(c: Operation) -> tuple[Tensor, int, Origin] | None:
    """The model's own scores as they are before this operation, if they are wanted and survive it."""
    state: Scores = c.state
    if not c.keep_finite or c.out is c.x or state.terms or state.fills or state.opaque or state.shifts:
        return None
    return c.x, version_of(c.x), state.origin


def mask_filled(c: Operation) -> State | None:
    """``masked_fill``."""
    return filled(c, c.arg(1, "mask").bool(), c.arg(2, "value"))


def filled(c: Operation, mask: Tensor, value: Any) -> State | None:
    """Overwriting where ``mask`` (True = masked)."""
    level = number(value)
    if isinstance(c.state, Exponentials):
        if level == 0:
            of = c.state.of
            return replace(c.state, origin=c.origin, of=of.but(fills=[*of.fills, Term(mask, c.origin)]))
        return None
    state: Scores = c.state
    if level is None or level > FILL or c.out.shape != c.x.shape:
        return opaque_scores(c)
    return state.but(
        origin=c.origin, fills=[*state.fills, Term(mask, c.origin)], finite=state.finite or unmasked_scores(c)
    )


def item_filled(c: Operation) -> State | None:
    """``scores[index] = value``."""
    value = c.args[2]
    mask = torch.zeros(c.x.shape, dtype=torch.bool, device=c.x.device)
    mask[c.args[1]] = True
    level = number(value)
    if level is None or level > FILL:
        return opaque_scores(c)
    state: Scores = c.state
    return state.but(fills=[*state.fills, Term(mask, c.origin)], finite=None)


def capped(c: Operation) -> State | None:
    """The soft cap, complete once it is multiplied back."""
    state: Scores = c.state
    if state.terms or state.fills or state.opaque or state.cap is not None or state.shifts:
        return opaque_scores(c)
    return state.but(origin=c.origin, cap=1.0, finite=None)


def clamped(c: Operation) -> State | None:
    """A clamp at a very negative bound changes nothing that is attended to."""
    low = c.kwargs.get("min", c.args[1] if len(c.args) > 1 else None)
    high = c.kwargs.get("max", c.args[2] if len(c.args) > 2 else None)
    if c.name.startswith("maximum") or c.name == "max":
        low, high = c.other(), None
    bound = number(low)
    if high is None and bound is not None and bound <= FILL:
        return same_state(c)
    return opaque_scores(c)


def where_filled(c: Operation) -> State | None:
    """``where(condition, scores, fill)`` either way round, method or function."""
    condition, one, two = (c.args[1], c.args[0], c.args[2]) if c.name == "where_method" else c.args[:3]
    if one is c.x:
        return filled(c, ~condition.bool(), two)
    if two is c.x:
        return filled(c, condition.bool(), one)
    return None


def scores_with_sink(c: Operation) -> State | None:
    """A column concatenated to the scores."""
    parts = c.args[0]
    others = [t for t in parts if t is not c.x]
    dim = c.arg(1, "dim", 0) % c.x.dim()
    if (
        len(others) != 1
        or others[0].dim() != c.x.dim()
        or others[0].shape[dim] != 1
        or c.state.sink is not None
        or c.look(others[0]) is not None
    ):
        return None
    sink = others[0]
    for shift in c.state.shifts:
        sink = sink + shift
    state: Scores = c.state
    return state.but(origin=c.origin, sink=sink, finite=state.finite or unmasked_scores(c))
