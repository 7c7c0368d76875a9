"""What an operation makes of scores that are still scores after it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...attention.masks import FILL
from .axis_history import Origin, known, resized
from .decisions import decide, version_then
from .operation import Operation, number, same_state
from .products import mixes_heads
from .states import Exponentials, LogWeights, RowStatistic, Scores, State, Step, Term, WeightedValues

# Of a distance: scores as well, as a rule those of a Gaussian.
_POWERS = frozenset(("pow", "pow_", "__pow__", "__ipow__", "square", "square_", "sqrt", "sqrt_", "float_power"))


def opaque_scores(c: Operation) -> State | None:
    """An operation that isn't known: its result is still scores if it is shaped like them, not by coincidence."""
    state: Scores = c.state
    if not (isinstance(c.out, Tensor) and c.out.shape == c.x.shape and keeps_axes(c, state)):
        return None
    before = state.before
    if before is None and not _is_factor(c) and not (state.score == "distance" and c.name in _POWERS):
        held = None if c.out is c.x else (c.x, version_then(c.x), state.origin)
        before = state.but(held=held)
    return state.but(opaque=[*state.opaque, c.name], finite=None, before=before)


def _is_factor(c: Operation) -> bool:
    """Whether scores were multiplied by a tensor that is not made of them: what comes of it are scores as well."""
    return c.kind.arithmetic in ("mul", "div") and c.position == 0 and c.look(c.other()) is None


def step_of(c: Operation) -> Step:
    """What an operation on the way from scores to weights was."""
    operands = (*c.args, *c.kwargs.values())
    others = [x for x in operands if x is not c.x]
    by = next((n for n in map(number, others) if n is not None), None)
    of_rows = any(isinstance(c.look(x), RowStatistic) for x in others if isinstance(x, Tensor))
    return Step(c.name.strip("_"), by, of_rows)


def scores_after_dropout(c: Operation) -> State | None:
    """Dropout of scores that may be weights already."""
    p, training = c.arg(1, "p", 0.5), c.arg(2, "training", True)
    if not training or p == 0:
        return same_state(c)
    state: Scores = c.state
    if c.out is c.x or c.out.shape != c.x.shape:
        return opaque_scores(c)
    return state.but(origin=c.origin, dropped=state.dropped or (c.x, state.origin, float(p)), finite=None)


def keeps_axes(c: Operation, scores: Scores) -> bool:
    """Whether the axes of a result are those of its argument: a linear map or a convolution must mix heads."""
    if not c.kind.sums_axis:
        return True
    layout = c.state.origin.layout()
    dim = 1 if c.name.startswith("conv") else -1
    return c.position == 0 and len(layout) > 1 and mixes_heads(scores.product, layout[dim])


def multiplied(c: Operation) -> State | None:
    """Multiplication by a number, or by a factor for each head."""
    made, of = _scaled(c, 1), c.state.product
    if made is not None or of.learned or "parameter" in (of.origin_a.birth, of.origin_b.birth):
        return made
    return weighted_values(c)


def divided(c: Operation) -> State | None:
    """Division by a number, or by a factor for each head."""
    return _scaled(c, -1) if c.position == 0 else opaque_scores(c)


def negated(c: Operation) -> State | None:
    """The negative of scores."""
    return _times(c, -1.0) or opaque_scores(c)


def _times(c: Operation, by: float | None) -> State | None:
    """Scores times a number; None where it is none, or turns masks round."""
    state: Scores = c.state
    if by and math.isfinite(by) and (by > 0 or not (state.terms or state.fills or state.sink is not None)):
        terms = [replace(t, factor=t.factor * by) for t in state.terms]
        shifts = [shift * by for shift in state.shifts]
        sink = None if state.sink is None else state.sink * by
        if state.cap is None:
            return state.but(
                origin=c.origin, scale=state.scale * by, terms=terms, shifts=shifts, sink=sink, finite=None
            )
        scale = math.copysign(state.scale, state.scale * by)
        cap = state.cap * abs(by)
        return state.but(origin=c.origin, scale=scale, cap=cap, terms=terms, shifts=shifts, sink=sink, finite=None)
    return None


def _scaled(c: Operation, sign: int) -> State | None:
    """Scores times the other operand to the power of ``sign``."""
    state: Scores = c.state
    other = c.other()
    by = number(other)
    made = _times(c, by**sign if by else None)
    if made is not None:
        return made
    if sign > 0 and not state.product.learned and is_indicator(other, c):
        return _weighing_nothing(c, other, "zero")
    plain = state.cap is None and not state.terms and not state.fills and not state.opaque
    if isinstance(other, Tensor) and plain and c.look(other) is None and other.dim() >= 2:
        layout = other.shape[-2:] == (1, 1)
        if layout:
            factor = Term(other, c.origin, how="" if sign > 0 else "inverse")
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
            of = mine.of if mine.of.sink is not None and mine.of.product is state.product else state
            return LogWeights(c.origin, of=of, dim=mine.dim)
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
    return c.x, version_then(c.x), state.origin


def mask_filled(c: Operation) -> State | None:
    """``masked_fill``."""
    return filled(c, c.arg(1, "mask"), "bool", c.arg(2, "value"))


def filled(c: Operation, mask: Tensor, how: str, value: Any) -> State | None:
    """Overwriting where ``mask`` says; ``how``: what of it is True where a score is masked (:attr:`.Term.how`)."""
    if mask.dtype == torch.bool and how == "bool":
        how = ""
    level = number(value)
    if level is None and isinstance(value, Tensor) and value.numel() and c.look(value) is None:
        level = decide(_largest, value) if value.is_floating_point() else None  # a tensor full of one number, say
        level = level if level is not None and level <= FILL else None
    if isinstance(c.state, Scores) and level == 0:
        return _weighing_nothing(c, mask, how)
    if isinstance(c.state, Exponentials):
        if level == 0:
            of = c.state.of
            return replace(c.state, origin=c.origin, of=of.but(fills=[*of.fills, Term(mask, c.origin, how=how)]))
        return None
    state: Scores = c.state
    if level is None or level > FILL or c.out.shape != c.x.shape:
        return opaque_scores(c)
    fills = [*state.fills, Term(mask, c.origin, how=how)]
    return state.but(origin=c.origin, fills=fills, finite=state.finite or unmasked_scores(c))


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


def _weighing_nothing(c: Operation, mask: Tensor, how: str) -> State | None:
    """Entries set to 0, which are hidden if these are weights already."""
    made = opaque_scores(c)
    if not isinstance(made, Scores):
        return made
    before = made.before or made.but(held=None if c.out is c.x else (c.x, version_then(c.x), c.state.origin))
    if made.before is None:
        before = c.state.but(held=before.held)
    return made.but(before=before.but(fills=[*before.fills, Term(mask, c.origin, how=how)]))


def is_indicator(other: Any, c: Operation) -> bool:
    """Whether an operand is a mask of zeros and ones."""
    if not isinstance(other, Tensor) or c.look(other) is not None or other.dim() == 0:
        return False
    return other.dtype == torch.bool or bool(decide(_zeros_and_ones, other))


def _zeros_and_ones(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _largest(x: Tensor) -> float:
    return float(x.detach().amax())


def weighted_values(c: Operation) -> State | None:
    """Weights times a tensor that has an axis more: values, if they are then summed over the keys."""
    v = c.other()
    if not isinstance(v, Tensor) or not isinstance(c.out, Tensor) or c.out is c.x or c.out.dim() < 2:
        return None
    n = c.out.dim()
    of_w, of_v = ((1,) * (n - x.dim()) + tuple(x.shape) for x in (c.x, v))
    width = [i for i in range(n) if of_w[i] == 1 and of_v[i] > 1]
    if not width or len(width) == n:
        return None
    labels = [i for i in range(n) if i not in width]
    weights = c.x.reshape(of_w).squeeze(tuple(width))
    layout = ((),) * (n - c.x.dim()) + c.state.origin.full()
    if len(layout) != n:
        return None
    state = replace(c.state, origin=known(tuple(layout[i] for i in labels)))
    return WeightedValues(
        c.origin, weights=weights, state=state, labels=labels, v=v, v_labels=list(range(n - v.dim(), n))
    )


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
        return filled(c, condition, "not", two)
    if two is c.x:
        return filled(c, condition, "bool", one)
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
    return _extended(c, sink, parts[0] is others[0])


def _extended(c: Operation, sink: Tensor, first: bool) -> Scores:
    """Scores with a column that takes part in the softmax and has no value; ``first``: before those of the keys."""
    state: Scores = c.state
    origin = Origin(c.out.shape, resized, state.origin)
    return state.but(origin=origin, sink=sink, sink_first=first, finite=state.finite or unmasked_scores(c))


def padded_scores(c: Operation) -> Scores | None:
    """Scores with a column of one number beside them, which is a sink if a softmax runs over it."""
    state: Scores = c.state
    pad, mode, value = c.arg(1, "pad"), c.arg(2, "mode", "constant"), c.arg(3, "value")
    value = 0.0 if value is None else number(value)
    if mode != "constant" or value is None or value <= FILL or state.sink is not None or state.before is not None:
        return None
    if list(pad[:2]) not in ([0, 1], [1, 0]) or any(pad[2:]):
        return None
    sink = torch.full_like(c.x[..., :1], value)
    for shift in state.shifts:
        sink = sink + shift
    return _extended(c, sink, list(pad[:2]) == [1, 0])


def added_up(c: Operation) -> State | None:
    """Products without a width, of one entry of each operand, added up along an axis; scores are lost by it."""
    state: Scores = c.state
    of = state.product
    if any(of.a.shape[of.la.index(x)] > 1 for x in of.contracted):
        return None
    return state.but(opaque=[*state.opaque, c.name], finite=None)
