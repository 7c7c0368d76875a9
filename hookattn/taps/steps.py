"""What an operation makes of scores and weights, step by step.

:data:`STEPS` says, operation by operation, what the result of an operation on a tensor with a state is. An operation
that isn't known is no error: the state becomes opaque, and the model's own values are taken when the softmax comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention import FILL
from .axes import Origin
from .states import Exp, LogWeights, Part, RowStat, Scores, State, Term, Weights

# A denominator this little above the sum of the exponentials is a guard against 0/0, not a sink.
_EPSILON = 1e-5

Step = Callable[["Context"], State | None]


@dataclass(slots=True)
class Context:
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


def carried(c: Context) -> State | None:
    """A view or a cast: the same state under the result's axes."""
    state: State = c.state
    if isinstance(state, Scores) and isinstance(c.out, Tensor) and c.out.numel() != c.x.numel():
        return Part(c.origin, of=state)
    return replace(state, origin=c.origin)


def opaque(c: Context) -> State | None:
    """An operation that isn't known: its result is still scores if it is shaped like them."""
    state = c.state
    if isinstance(state, Scores) and isinstance(c.out, Tensor) and c.out.shape == c.x.shape:
        return state.but(opaque=[*state.opaque, c.name], finite=None)
    return None


def scaled(c: Context, sign: int) -> State | None:
    """Multiplication (``sign`` 1) or division (−1)."""
    state: Scores = c.state
    if sign < 0 and c.position != 0:
        return opaque(c)
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
    return opaque(c)


def added(c: Context, sign: int) -> State | None:
    """Addition or subtraction of a tensor or number."""
    state: Scores = c.state
    other = c.other()
    factor = float(sign) * float(c.kwargs.get("alpha", 1))
    mine = c.look(other)
    if isinstance(mine, RowStat) and sign < 0 and c.position == 0:
        if mine.kind == "lse":
            return LogWeights(c.origin, of=state, dim=mine.dim)
        if mine.kind == "max":
            return state.but(origin=c.origin, shifts=[*state.shifts, other], finite=None)
    if c.position != 0 and sign < 0:
        return opaque(c)
    if isinstance(mine, Scores) and mine.opaque and not state.opaque:
        pass  # a second product, gathered or shifted: a bias to the first
    elif isinstance(mine, Scores) and state.opaque and c.position == 0:
        return added(replace(c, state=mine, x=other, position=1), sign)
    value = number(other)
    if value is not None:
        return (
            carried(c)
            if value == 0
            else state.but(origin=c.origin, shifts=[*state.shifts, -factor * value], finite=None)
        )
    if isinstance(c.out, Tensor) and c.out.shape != c.x.shape:
        return None
    return state.but(
        origin=c.origin, terms=[*state.terms, Term(other, c.origin, factor)], finite=state.finite or finite_of(c)
    )


def finite_of(c: Context) -> tuple[Tensor, int, Origin] | None:
    """The model's own scores as they are before this operation, if they are wanted and survive it."""
    state: Scores = c.state
    if not c.keep_finite or c.out is c.x or state.terms or state.fills or state.opaque or state.shifts:
        return None
    return c.x, (-1 if c.x.is_inference() else c.x._version), state.origin


def filled(c: Context, mask: Tensor, value: Any) -> State | None:
    """Overwriting where ``mask`` (True = masked)."""
    level = number(value)
    if isinstance(c.state, Exp):
        if level == 0:
            of = c.state.of
            return replace(c.state, origin=c.origin, of=of.but(fills=[*of.fills, Term(mask, c.origin)]))
        return None
    state: Scores = c.state
    if level is None or level > FILL or c.out.shape != c.x.shape:
        return opaque(c)
    return state.but(origin=c.origin, fills=[*state.fills, Term(mask, c.origin)], finite=state.finite or finite_of(c))


def set_item(c: Context) -> State | None:
    """``scores[index] = value``."""
    value = c.args[2]
    mask = torch.zeros(c.x.shape, dtype=torch.bool, device=c.x.device)
    mask[c.args[1]] = True
    level = number(value)
    if level is None or level > FILL:
        return opaque(c)
    state: Scores = c.state
    return state.but(fills=[*state.fills, Term(mask, c.origin)], finite=None)


def tanh(c: Context) -> State | None:
    """The soft cap, complete once it is multiplied back."""
    state: Scores = c.state
    if state.terms or state.fills or state.opaque or state.cap is not None or state.shifts:
        return opaque(c)
    return state.but(origin=c.origin, cap=1.0, finite=None)


def clamped(c: Context) -> State | None:
    """A clamp at a very negative bound changes nothing that is attended to."""
    low = c.kwargs.get("min", c.args[1] if len(c.args) > 1 else None)
    high = c.kwargs.get("max", c.args[2] if len(c.args) > 2 else None)
    if c.name.startswith("maximum") or c.name == "max":
        low, high = c.other(), None
    bound = number(low)
    if high is None and bound is not None and bound <= FILL:
        return carried(c)
    return opaque(c)


def where(c: Context) -> State | None:
    """``where(condition, scores, fill)`` either way round, method or function."""
    condition, one, two = (c.args[1], c.args[0], c.args[2]) if c.name == "where_method" else c.args[:3]
    if one is c.x:
        return filled(c, ~condition.bool(), two)
    if two is c.x:
        return filled(c, condition.bool(), one)
    return None


def soft_max(c: Context) -> State | None:
    """Softmax of scores."""
    dim = c.arg(1, "dim", -1)
    if dim is None:
        return None
    return weights_of(c.state, c.state.origin, c.origin, dim % c.x.dim(), c.x)


def weights_of(scores: Scores, scores_origin: Origin, origin: Origin, dim: int, tensor: Tensor | None) -> Weights:
    """The state of freshly made weights."""
    return Weights(
        origin,
        scores=scores,
        scores_origin=scores_origin,
        dim=dim,
        scores_tensor=tensor,
        extended=scores.sink is not None,
    )


def log_soft_max(c: Context) -> State | None:
    """``log_softmax`` of scores."""
    return LogWeights(c.origin, of=c.state, dim=c.arg(1, "dim", -1) % c.x.dim())


def exp(c: Context) -> State | None:
    """exp of scores, or of their log-softmax."""
    if isinstance(c.state, LogWeights):
        return weights_of(c.state.of, c.state.origin, c.origin, c.state.dim, None)
    return Exp(c.origin, of=c.state)


def statistic(kind: str) -> Step:
    """A reduction of a row: max and logsumexp of scores, sum of exponentials."""

    def step(c: Context) -> State | None:
        dim = c.kwargs.get("dim", c.args[1] if len(c.args) > 1 else None)
        if isinstance(dim, (list, tuple)):
            dim = dim[0] if len(dim) == 1 else None
        if not isinstance(dim, int):
            return None
        of = c.state.of if isinstance(c.state, Exp) else c.state
        return RowStat(c.origin, kind=kind, of=of, dim=dim % c.x.dim())

    return step


def denominator(c: Context) -> State | None:
    """``sum + extra``: a sink if it is more than a guard against 0/0."""
    stat: RowStat = c.state
    other = c.other()
    if stat.kind != "sum":
        return None
    value = number(other)
    extra = other if value is None else 0.0 if value <= _EPSILON else value
    return replace(stat, origin=c.origin, extra=extra) if isinstance(stat.extra, float) and stat.extra == 0 else None


def normalised(c: Context) -> State | None:
    """``exp / sum``: weights."""
    stat = c.look(c.other())
    state: Exp = c.state
    if not (
        isinstance(stat, RowStat) and stat.kind == "sum" and c.position == 0 and stat.of.product is state.of.product
    ):
        return None
    scores = state.of
    if not (isinstance(stat.extra, float) and stat.extra == 0.0):
        logit = torch.as_tensor(stat.extra, dtype=c.x.dtype, device=c.x.device).log()
        for shift in scores.shifts:
            logit = logit + shift
        scores = scores.but(sink=logit)
    weights = weights_of(scores, state.origin, c.origin, stat.dim, None)
    weights.extended = False
    return weights


def exp_times(c: Context) -> State | None:
    """A mask of zeros and ones multiplied into the exponentials."""
    other = c.other()
    if isinstance(other, Tensor) and c.look(other) is None and bool(((other == 0) | (other == 1)).all()):
        return filled(c, other == 0, 0.0)
    return None


def sink_joined(c: Context) -> State | None:
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
    return state.but(origin=c.origin, sink=sink, finite=state.finite or finite_of(c))


def weights_sliced(c: Context) -> State | None:
    """The sink's column dropped again, or a view."""
    state: Weights = c.state
    if state.extended and c.out.dim() == c.x.dim() and c.out.shape[state.dim] == c.x.shape[state.dim] - 1:
        own = None if state.own is None else (state.own[0][c.args[1]], c.origin)
        return replace(state, origin=c.origin, extended=False, own=own)
    return replace(state, origin=c.origin) if c.out.numel() == c.x.numel() else None


def dropped(c: Context) -> State | None:
    """Dropout: the weights are what they were before it."""
    p, training = c.arg(1, "p", 0.5), c.arg(2, "training", True)
    if not training or p == 0:
        return carried(c)
    state: Weights = c.state
    return replace(state, origin=c.origin, own=state.own or (c.x, state.origin), dropout=float(p))


def weights_mixed(c: Context) -> State | None:
    """Anything else done to weights before they meet the values."""
    state: Weights = c.state
    if not isinstance(c.out, Tensor) or c.out.shape != c.x.shape:
        return None
    return replace(state, own=state.own or (c.x, state.origin), mixed=[*state.mixed, c.name])


def masked_weights(c: Context) -> State | None:
    """Weights set to 0 where masked: what the model multiplies is what counts."""
    if number(c.arg(2, "value")) == 0:
        return carried(c)
    return weights_mixed(c)


def names(text: str, step: Step) -> dict[str, Step]:
    """One step for several operations."""
    return dict.fromkeys(text.split(), step)


_VIEWS = (
    "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as transpose swapaxes swapdims permute "
    "movedim moveaxis mT T t contiguous clone detach to float half double bfloat16 type type_as "
    "requires_grad_ alias expand expand_as nan_to_num nan_to_num_"
)

STEPS: dict[type, dict[str, Step]] = {
    Scores: {
        **names(_VIEWS + " __getitem__ narrow select chunk split", carried),
        **names("mul mul_ multiply __mul__ __rmul__ __imul__", lambda c: scaled(c, 1)),
        **names("div div_ divide true_divide __truediv__ __itruediv__", lambda c: scaled(c, -1)),
        **names("add add_ __add__ __radd__ __iadd__", lambda c: added(c, 1)),
        **names("sub sub_ subtract __sub__ __isub__", lambda c: added(c, -1)),
        **names("masked_fill masked_fill_", lambda c: filled(c, c.arg(1, "mask").bool(), c.arg(2, "value"))),
        **names("where where_method", where),
        **names("tanh tanh_", tanh),
        **names("clamp clamp_ clip clamp_min clamp_min_ maximum", clamped),
        "max": lambda c: clamped(c) if len(c.args) > 1 and isinstance(c.args[1], Tensor) else statistic("max")(c),
        "__setitem__": set_item,
        "softmax": soft_max,
        "log_softmax": log_soft_max,
        **names("exp exp_", exp),
        "amax": statistic("max"),
        "logsumexp": statistic("lse"),
        **names("cat concat concatenate", sink_joined),
    },
    Part: names(_VIEWS + " __getitem__", carried),
    Exp: {
        **names(_VIEWS, carried),
        "sum": statistic("sum"),
        **names("div div_ divide true_divide", normalised),
        **names("mul mul_ multiply", exp_times),
        **names("masked_fill masked_fill_", lambda c: filled(c, c.arg(1, "mask").bool(), c.arg(2, "value"))),
    },
    LogWeights: {**names(_VIEWS, carried), **names("exp exp_", exp)},
    RowStat: {
        **names(_VIEWS, carried),
        **names("add add_", denominator),
        **names("clamp clamp_ clamp_min", lambda c: replace(c.state, origin=c.origin)),
    },
    Weights: {
        **names(_VIEWS, carried),
        **names("__getitem__ narrow", weights_sliced),
        **names("dropout dropout_ feature_dropout alpha_dropout native_dropout", dropped),
        **names("masked_fill masked_fill_", masked_weights),
    },
}


def step(c: Context) -> State | None:
    """The state of the result of an operation; None where it is no part of an attention any more."""
    known = STEPS[type(c.state)].get(c.name)
    if known is not None:
        return known(c)
    if isinstance(c.state, Scores):
        return opaque(c)
    return weights_mixed(c) if isinstance(c.state, Weights) else None
