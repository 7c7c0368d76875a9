"""What an operation makes of the tensors of an attention, step by step.

:data:`STEPS` says, operation by operation, what the result of an operation on a tensor with a state is. An operation
that isn't known is no error: the state becomes opaque, and the model's own values are taken when the softmax comes.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .axes import Origin, resized
from .context import Context, Step, carried
from .joined import joined
from .scoring import added, clamped, filled, opaque, scaled, set_item, tanh, where
from .states import Exp, LogWeights, Lost, Part, RowStat, Scores, State, Sum, Weights
from .weighing import (
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
_ADD = "add add_ __add__ __radd__ __iadd__"
_SUB = "sub sub_ subtract __sub__ __isub__"
# What moves scores about, and may be followed by a softmax over them.
_MOVES = frozenset(
    f"{_VIEWS} {_MUL} {_DIV} {_ADD} {_SUB} cat concat concatenate stack hstack vstack pad __getitem__ __setitem__ "
    "narrow select chunk split unbind as_strided unfold gather index_select take_along_dim take masked_select diagonal "
    "roll flip repeat repeat_interleave where where_method masked_fill masked_fill_ scatter scatter_ copy_ index_copy "
    "index_copy_ index_put index_put_ index_add maximum clamp clamp_min tril triu rot90".split()
)

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


def step(c: Context) -> State | None:
    """The state of the result of an operation; None where it is no part of an attention any more."""
    known = STEPS[type(c.state)].get(c.name)
    if known is not None:
        new = known(c)
    elif isinstance(c.state, Scores):
        new = opaque(c)
    else:
        new = weights_mixed(c) if isinstance(c.state, Weights) else None
    return new if new is not None else lost(c)


def lost(c: Context) -> State | None:
    """Scores whose entries were moved about by something that is not followed."""
    if c.name not in _MOVES or not isinstance(c.out, Tensor) or not c.out.is_floating_point():
        return None
    if isinstance(c.state, Lost):
        return Lost(c.origin, why=c.state.why)
    of = c.state.of if isinstance(c.state, Part) else c.state
    if not isinstance(of, Scores) or of.product.learned:
        return None
    return Lost(c.origin, why=LOST.format(f"'{c.name.strip('_')}'"))


def pieces(c: Context) -> list[State | None]:
    """What each of the parts is that a tensor was split into (``c.out``)."""
    if isinstance(c.state, Weights):
        return shares(c)
    of = c.state.of if isinstance(c.state, Part) else c.state
    made: list[State | None] = []
    for one in c.out:
        origin = Origin(one.shape, resized, c.state.origin)
        if isinstance(of, Scores):
            made.append(Part(origin, of=of))
        else:
            made.append(Lost(origin, why=of.why) if isinstance(of, Lost) else None)
    return made
