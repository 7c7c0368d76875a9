"""What an operation makes of the tensors of an attention: the rules of its row, and those of all operations.

An operation that has no rule is no error: the state becomes opaque, and the model's own values are taken when the
softmax comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import Tensor

from .axis_history import Origin, resized
from .entries import Entries
from .operation import Operation, Rule, number, same_state
from .pairwise import changed_pairs
from .score_rules import opaque_scores, padded_scores, step_of
from .states import Pairwise, ScatteredOutput, ScatteredScores, ScatteredWeights, Scores, ScoresSlice, State, Weights
from .weight_rules import mixed_weights, piece_weights

LOST = "softmax over scores of q·k that went through {} before it, which is not followed"


def next_state(c: Operation) -> State | None:
    """The state of the result of an operation; None where it is no part of an attention any more."""
    if isinstance(c.state, ScatteredWeights):
        return scattered_weights(c)
    if isinstance(c.state, ScatteredOutput):
        return scattered_output(c)
    rule = c.kind.rules.get(type(c.state)) or _UNLISTED.get(type(c.state))
    new = None if rule is None else rule(c)
    if new is None:
        return scattered(c)
    if isinstance(new, Scores) and isinstance(c.state, Scores) and _is_step(c, new, rule):
        new.steps = [*c.state.steps, step_of(c)]
    return new


def _is_step(c: Operation, new: Scores, rule: Rule | None) -> bool:
    """Whether an operation is one of those that make weights of scores: no view or copy, no dropout and no mask."""
    if new.before is None or rule is same_state or c.kind.drops_out:
        return False
    return len(new.before.fills) == len((c.state.before or c.state).fills)


def _opaque_unless_shuffled(c: Operation) -> State | None:
    return None if c.kind.shuffles else opaque_scores(c)


# What an operation makes of a state that its row has no rule for. A result of the scores' shape is taken for scores
# that something was done to; of an operation that puts entries elsewhere, the shape proves nothing.
_UNLISTED: dict[type[State], Rule] = {
    Scores: _opaque_unless_shuffled,
    Weights: mixed_weights,
    Pairwise: changed_pairs,
}


def scattered(c: Operation) -> State | None:
    """Scores whose entries were moved about."""
    if not c.kind.moves_scores or not isinstance(c.out, Tensor) or not c.out.is_floating_point():
        return None
    made = scattered_scores(c, c.moved())
    if isinstance(made, ScatteredScores) and c.name == "pad" and isinstance(c.state, Scores):
        made.padded = padded_scores(c)
    return made


def scattered_scores(c: Operation, entries: Entries | None) -> State | None:
    """The state of scores that are not laid out as their product made them any more."""
    states = [s for s in (c.look(x) for x in _flat(c.args)) if isinstance(s, (Scores, ScoresSlice, ScatteredScores))]
    scales, opaque = dict[int, float](), False
    for state in states:
        of = state.of if isinstance(state, ScoresSlice) else state
        if isinstance(of, ScatteredScores):
            scales.update(of.scales)
            opaque = opaque or of.opaque
        else:
            scales.setdefault(id(of.product), of.scale)
            opaque = opaque or bool(of.opaque)
    first = states[0] if states else c.state
    if c.kind.arithmetic in ("mul", "div"):
        by = number(c.other()) if len(c.args) == 2 else None
        if c.kind.arithmetic == "div":
            by = 1 / by if by and c.position == 0 else None
        if by is None or by <= 0:
            opaque = True
        else:
            scales = {product: scale * by for product, scale in scales.items()}
    if isinstance(first, ScatteredScores):
        return ScatteredScores(c.origin, why=first.why, entries=entries, scales=scales, opaque=opaque)
    of = first.of if isinstance(first, ScoresSlice) else first
    if not isinstance(of, Scores) or of.product.learned:
        return None
    return ScatteredScores(
        c.origin, why=LOST.format(f"'{c.name.strip('_')}'"), entries=entries, scales=scales, opaque=opaque
    )


def scattered_weights(c: Operation) -> State | None:
    """Weights that are moved about."""
    state: ScatteredWeights = c.state
    if c.kind.drops_out:
        p, training = c.arg(1, "p", 0.5), c.arg(2, "training", True)
        if training and p and c.out is c.x:
            return None  # what was there before is gone
        if training and p:
            return replace(state, origin=c.origin, own=state.own or (c.x, state.entries), dropout=float(p))
    if not isinstance(c.out, Tensor) or c.kind.arithmetic is not None:
        return None
    entries = c.moved()
    return None if entries is None else replace(state, origin=c.origin, entries=entries)


def scattered_output(c: Operation) -> State | None:
    """Values that such weights gathered: views of them, and sums."""
    state: ScatteredOutput = c.state
    if c.kind.arithmetic == "add":
        other = c.look(c.other())
        if number(c.other()) == 0:
            return state
        if not isinstance(other, ScatteredOutput) or other.root is not state.root or c.out.shape != c.x.shape:
            return None
        uses, entries = [*state.uses, *other.uses], [*state.entries, *other.entries]
        return ScatteredOutput(c.origin, root=state.root, uses=uses, entries=entries)
    if not isinstance(c.out, Tensor) or c.kind.arithmetic is not None:
        return None
    kept = []
    for one in state.entries:
        part = c.moved(lambda x, one=one: one if x is c.x else None)  # type: ignore[misc]
        if part is None:
            return None
        kept.append(part)
    return replace(state, origin=c.origin, entries=kept)


def _flat(args: Sequence[Any]) -> Iterator[Any]:
    for arg in args:
        yield from arg if isinstance(arg, (list, tuple)) else (arg,)


def piece_states(c: Operation) -> list[State | None]:
    """What each of the parts is that a tensor was split into (``c.out``)."""
    if isinstance(c.state, Weights):
        return piece_weights(c)
    mine = c.entries(c.x)
    of = c.state.of if isinstance(c.state, ScoresSlice) else c.state
    made: list[State | None] = []
    for i, one in enumerate(c.out):
        origin = Origin(one.shape, resized, c.state.origin)
        entries = None if mine is None else Entries(partial(_piece, c, i), [mine])
        if isinstance(of, Scores):
            made.append(ScoresSlice(origin, of=of, entries=entries))
        elif isinstance(of, ScatteredScores) or (isinstance(of, ScatteredWeights) and entries is not None):
            made.append(replace(cast(Any, of), origin=origin, entries=entries))
        else:
            made.append(None)
    return made


def _piece(c: Operation, i: int, numbers: Tensor) -> Tensor:
    return c.func(numbers, *c.args[1:], **c.kwargs)[i]  # type: ignore[no-any-return]
