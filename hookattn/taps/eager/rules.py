"""What an operation makes of the tensors of an attention, step by step.

:data:`STEPS` says, operation by operation, what the result of an operation on a tensor with a state is. An operation
that isn't known is no error: the state becomes opaque, and the model's own values are taken when the softmax comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import Tensor

from .axis_history import Origin, resized
from .concat_rules import joined
from .entries import Entries, moved
from .operation import Operation, Step, carried, number
from .score_rules import added, clamped, filled, opaque, scaled, set_item, tanh, where
from .states import Exp, Gathered, LogWeights, Lost, Part, RowStat, Scores, Spread, State, Sum, Weights
from .weight_rules import (
    denominator,
    dropped,
    exp,
    exp_times,
    log_soft_max,
    masked_weights,
    normalised,
    shares,
    soft_max,
    softmax_lost,
    statistic,
    summed,
    weights_mixed,
    weights_sliced,
)


def names(text: str, step: Step) -> dict[str, Step]:
    """One step for several operations."""
    return dict.fromkeys(text.split(), step)


_VIEWS = (
    "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as transpose swapaxes swapdims permute "
    "movedim moveaxis mT T t contiguous clone detach to float half double bfloat16 type type_as "
    "requires_grad_ alias expand expand_as nan_to_num nan_to_num_"
)
_MUL = "mul mul_ multiply __mul__ __rmul__ __imul__"
_DIV = "div div_ divide true_divide __truediv__ __itruediv__"
_MULTIPLIES = [*_MUL.split(), *_DIV.split()]
_ADD = "add add_ __add__ __radd__ __iadd__"
_SUB = "sub sub_ subtract __sub__ __isub__"
# What moves scores about, and may be followed by a softmax over them.
_MOVES = frozenset(
    f"{_VIEWS} {_MUL} {_DIV} {_ADD} {_SUB} cat concat concatenate stack hstack vstack pad __getitem__ __setitem__ "
    "narrow select chunk split unbind as_strided unfold gather index_select take_along_dim take masked_select diagonal "
    "roll flip repeat repeat_interleave where where_method masked_fill masked_fill_ scatter scatter_ copy_ index_copy "
    "index_copy_ index_put index_put_ index_add sort msort cumsum maximum clamp clamp_min tril triu rot90".split()
)

# What leaves the shape alone and not the places.
_REARRANGES = frozenset("flip fliplr flipud roll rot90 gather take_along_dim index_select sort msort cumsum".split())
LOST = "softmax over scores of q·k that went through {} before it, which is not followed"

STEPS: dict[type, dict[str, Step]] = {
    Scores: {
        **names(_VIEWS + " __getitem__ narrow select chunk split", carried),
        **names(_MUL, lambda c: scaled(c, 1)),
        **names(_DIV, lambda c: scaled(c, -1)),
        **names(_ADD, lambda c: added(c, 1)),
        **names(_SUB, lambda c: added(c, -1)),
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
        **names("cat concat concatenate", joined),
    },
    Part: {**names(_VIEWS + " __getitem__", carried), "softmax": softmax_lost},
    Lost: {"softmax": softmax_lost},
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
    Sum: {**names(_VIEWS, carried), **names(_ADD, summed)},
}


def step(c: Operation) -> State | None:
    """The state of the result of an operation; None where it is no part of an attention any more."""
    if isinstance(c.state, Spread):
        return spread(c)
    if isinstance(c.state, Gathered):
        return gathered(c)
    known = STEPS[type(c.state)].get(c.name)
    if known is not None:
        new = known(c)
    elif isinstance(c.state, Scores):
        new = None if c.name in _REARRANGES else opaque(c)
    else:
        new = weights_mixed(c) if isinstance(c.state, Weights) else None
    return new if new is not None else lost(c)


def lost(c: Operation) -> State | None:
    """Scores whose entries were moved about."""
    if c.name not in _MOVES or not isinstance(c.out, Tensor) or not c.out.is_floating_point():
        return None
    return spread_scores(c, c.moved())


def spread_scores(c: Operation, entries: Entries | None) -> State | None:
    """The state of scores that are not laid out as their product made them any more."""
    states = [s for s in (c.look(x) for x in _flat(c.args)) if isinstance(s, (Scores, Part, Lost))]
    scales, dark = dict[int, float](), False
    for state in states:
        of = state.of if isinstance(state, Part) else state
        if isinstance(of, Lost):
            scales.update(of.scales)
            dark = dark or of.opaque
        else:
            scales.setdefault(id(of.product), of.scale)
            dark = dark or bool(of.opaque)
    first = states[0] if states else c.state
    if c.name in _MULTIPLIES:
        by = number(c.other()) if len(c.args) == 2 else None
        if c.name in _DIV.split():
            by = 1 / by if by and c.position == 0 else None
        if by is None or by <= 0:
            dark = True
        else:
            scales = {product: scale * by for product, scale in scales.items()}
    if isinstance(first, Lost):
        return Lost(c.origin, why=first.why, entries=entries, scales=scales, opaque=dark)
    of = first.of if isinstance(first, Part) else first
    if not isinstance(of, Scores) or of.product.learned:
        return None
    return Lost(c.origin, why=LOST.format(f"'{c.name.strip('_')}'"), entries=entries, scales=scales, opaque=dark)


def spread(c: Operation) -> State | None:
    """Weights that are moved about."""
    state: Spread = c.state
    if c.name.startswith("dropout"):
        p, training = c.arg(1, "p", 0.5), c.arg(2, "training", True)
        if training and p and c.out is c.x:
            return None  # what was there before is gone
        if training and p:
            return replace(state, origin=c.origin, own=state.own or (c.x, state.entries), dropout=float(p))
    if not isinstance(c.out, Tensor) or (c.name in _MULTIPLIES + _ADD.split() + _SUB.split()):
        return None
    entries = c.moved()
    return None if entries is None else replace(state, origin=c.origin, entries=entries)


def gathered(c: Operation) -> State | None:
    """Values that such weights gathered: views of them, and sums."""
    state: Gathered = c.state
    if c.name in _ADD.split():
        other = c.look(c.other())
        if number(c.other()) == 0:
            return state
        if not isinstance(other, Gathered) or other.root is not state.root or c.out.shape != c.x.shape:
            return None
        uses, entries = [*state.uses, *other.uses], [*state.entries, *other.entries]
        return Gathered(c.origin, root=state.root, uses=uses, entries=entries)
    if not isinstance(c.out, Tensor) or c.name in _MULTIPLIES + _SUB.split():
        return None
    kept = []
    for one in state.entries:
        part = moved(c.name, c.func, c.args, c.kwargs, c.x, c.position, c.out, lambda x: one if x is c.x else None)  # noqa: B023
        if part is None:
            return None
        kept.append(part)
    return replace(state, origin=c.origin, entries=kept)


def _flat(args: Sequence[Any]) -> Iterator[Any]:
    for arg in args:
        yield from arg if isinstance(arg, (list, tuple)) else (arg,)


def pieces(c: Operation) -> list[State | None]:
    """What each of the parts is that a tensor was split into (``c.out``)."""
    if isinstance(c.state, Weights):
        return shares(c)
    mine = c.entries(c.x)
    of = c.state.of if isinstance(c.state, Part) else c.state
    made: list[State | None] = []
    for i, one in enumerate(c.out):
        origin = Origin(one.shape, resized, c.state.origin)
        entries = None if mine is None else Entries(partial(_piece, c, i), [mine])
        if isinstance(of, Scores):
            made.append(Part(origin, of=of, entries=entries))
        elif isinstance(of, Lost) or (isinstance(of, Spread) and entries is not None):
            made.append(replace(cast(Any, of), origin=origin, entries=entries))
        else:
            made.append(None)
    return made


def _piece(c: Operation, i: int, numbers: Tensor) -> Tensor:
    return c.func(numbers, *c.args[1:], **c.kwargs)[i]  # type: ignore[no-any-return]
