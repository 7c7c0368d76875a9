"""From scores to weights, and what an operation makes of weights before they meet the values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...attention.masks import FILL
from .axis_history import Origin, resized
from .decisions import decide, is_zero, version_then
from .entries import Entries
from .operation import EntriesOf, Operation, number, same_state
from .pairwise import pairs_as_scores
from .score_rules import clamped, filled, is_indicator, keeps_axes, weighted_values
from .states import (
    Exponentials,
    LogWeights,
    PartialOutput,
    RowStatistic,
    ScatteredScores,
    ScatteredSoftmax,
    ScatteredWeights,
    Scores,
    ScoresSlice,
    SoftmaxUse,
    State,
    Term,
    TopScores,
    WeightedValues,
    Weights,
)

# A denominator this little above the sum of the exponentials is a guard against 0/0, not a sink.
_EPSILON = 1e-5


def weights_of_scores(c: Operation) -> State | None:
    """Softmax of scores."""
    dim = c.arg(1, "dim", -1)
    if dim is None:
        return None
    return new_weights(c.state, c.state.origin, c.origin, dim % c.x.dim(), c.x)


def weights_of_pairs(c: Operation) -> State | None:
    """Softmax over what was made of pairs of numbers, that had no width: a sum of one for each query and each key."""
    dim, scores = c.arg(1, "dim", -1), pairs_as_scores(c.state, c.x)
    if dim is None or scores is None:
        return None
    return new_weights(scores, scores.origin, scores.origin, dim % c.x.dim(), c.x)


def scattered_softmax(c: Operation) -> State | None:
    """Softmax of scores that were moved about, or lost on the way."""
    dim = c.arg(1, "dim", -1)
    if dim is None:
        return None
    state: ScatteredScores | ScoresSlice = c.state
    if isinstance(state, ScatteredScores) and state.padded is not None:
        return new_weights(state.padded, state.padded.origin, state.padded.origin, dim % c.x.dim(), c.x)
    why = state.why if isinstance(state, ScatteredScores) else "softmax over a part of the scores of a product"
    scales = state.scales if isinstance(state, ScatteredScores) else {0: state.of.scale}
    if state.entries is None or len(set(scales.values())) != 1 or not isinstance(c.out, Tensor):
        return Weights(c.origin, dim=dim % c.x.dim(), why=why)
    opaque = state.opaque if isinstance(state, ScatteredScores) else bool(state.of.opaque)
    scale = next(iter(scales.values()))
    root = ScatteredSoftmax(
        c.x, c.out, dim % c.x.dim(), state.entries, scale, opaque, SoftmaxUse(None, why=why), version_then(c.x)
    )
    return ScatteredWeights(c.origin, root=root, entries=Entries(source=root, shape=tuple(c.out.shape)))


def new_weights(scores: Scores, scores_origin: Origin, origin: Origin, dim: int, tensor: Tensor | None) -> Weights:
    """The state of freshly made weights."""
    return Weights(
        origin,
        scores=scores,
        scores_origin=scores_origin,
        dim=dim,
        scores_tensor=tensor,
        extended=scores.sink is not None,
    )


def log_weights(c: Operation) -> State | None:
    """``log_softmax`` of scores."""
    extended = c.state.sink is not None
    return LogWeights(c.origin, of=c.state, dim=c.arg(1, "dim", -1) % c.x.dim(), extended=extended)


def exponentials(c: Operation) -> State | None:
    """exp of scores, or of their log-softmax."""
    if isinstance(c.state, LogWeights):
        made = new_weights(c.state.of, c.state.origin, c.origin, c.state.dim, None)
        made.extended = c.state.extended
        return made
    return Exponentials(c.origin, of=c.state)


def maximum(c: Operation) -> State | None:
    """``max``: of two tensors a clamp, else the maximum of every row."""
    return clamped(c) if len(c.args) > 1 and isinstance(c.args[1], Tensor) else row_maximum(c)


def row_maximum(c: Operation) -> State | None:
    """The maximum of every row of scores."""
    return _row_statistic(c, "max", c.state)


def row_logsumexp(c: Operation) -> State | None:
    """The logsumexp of every row of scores."""
    of = c.state.padded if isinstance(c.state, ScatteredScores) else c.state
    if of is None:
        return None
    of.product.log_sums = True
    return _row_statistic(c, "lse", of)


def row_sum(c: Operation) -> State | None:
    """The sum of every row of exponentials: the denominator of the softmax."""
    return _row_statistic(c, "sum", c.state.of)


def row_total(c: Operation) -> State | None:
    """The sum of every row of what was made of scores, that may be divided by it."""
    return _row_statistic(c, "total", c.state) if c.state.before is not None else None


def _row_statistic(c: Operation, kind: str, of: Scores) -> State | None:
    dim = c.arg(1, "dim")
    if isinstance(dim, (list, tuple)):
        dim = dim[0] if len(dim) == 1 else None
    if not isinstance(dim, int):
        return None
    return RowStatistic(c.origin, kind=kind, of=of, dim=dim % c.x.dim())


def clamped_statistic(c: Operation) -> State | None:
    """A denominator kept away from 0."""
    return same_state(c)


def logarithm(c: Operation) -> State | None:
    """The logarithm of a sum of exponentials."""
    stat: RowStatistic = c.state
    if stat.kind != "sum":
        return None
    of = _with_extra(stat, c.x)
    return None if of is None else RowStatistic(c.origin, kind="lse", of=of, dim=stat.dim)


def extended_logsumexp(c: Operation) -> State | None:
    """``logaddexp`` of a logsumexp and a sink, or its ``softplus``, where the sink is 0."""
    stat: RowStatistic = c.state
    sink = torch.zeros_like(c.x) if c.name == "softplus" else c.other()
    if stat.kind != "lse" or not isinstance(sink, Tensor) or stat.of.sink is not None:
        return None
    for shift in stat.of.shifts:
        sink = sink + shift
    return replace(stat, origin=c.origin, of=stat.of.but(sink=sink))


def _with_extra(stat: RowStatistic, like: Tensor) -> Scores | None:
    """The scores of a sum of exponentials, with what was added to it as their sink."""
    scores = stat.of
    if isinstance(stat.extra, float) and stat.extra == 0.0:
        return scores
    if scores.sink is not None:
        return None
    logit = torch.as_tensor(stat.extra, dtype=like.dtype, device=like.device).log()
    for shift in scores.shifts:
        logit = logit + shift
    return scores.but(sink=logit)


def sink_of(stat: RowStatistic, like: Tensor) -> Tensor | None:
    """The logit of what was added to a sum of exponentials; None: nothing was."""
    of = _with_extra(stat, like)
    return None if of is None else of.sink


def largest_scores(c: Operation) -> State | None:
    """``topk`` of scores."""
    dim, results = c.arg(2, "dim", -1), c.results
    if not isinstance(results, tuple) or len(results) != 2 or c.state.sink is not None:
        return None
    return TopScores(c.origin, of=c.state, held=c.x, index=results[1], dim=dim % c.x.dim())


def scaled_largest(c: Operation) -> State | None:
    """The largest scores times a number."""
    state: TopScores = c.state
    by = number(c.other())
    if not by or by < 0 or state.weights or state.of.opaque or state.of.cap is not None or c.position != 0:
        return None
    by = by if c.kind.arithmetic == "mul" else 1 / by
    of = state.of
    terms = [replace(t, factor=t.factor * by) for t in of.terms]
    scaled = of.but(scale=of.scale * by, terms=terms, shifts=[x * by for x in of.shifts])
    return replace(state, origin=c.origin, of=scaled)


def weights_of_largest(c: Operation) -> State | None:
    """Softmax of the largest scores."""
    state: TopScores = c.state
    dim = c.arg(1, "dim", -1)
    if dim is None or dim % c.x.dim() != state.dim or state.weights:
        return None
    return replace(state, origin=c.origin, weights=True)


def scattered_largest(c: Operation) -> State | None:
    """The largest scores, or their weights, put where they were picked from: the others are masked."""
    state, dim, index = c.look(c.args[3]), c.args[1], c.args[2]
    if not isinstance(state, TopScores) or dim % c.out.dim() != state.dim or c.out.shape != state.held.shape:
        return None
    if index is not state.index and not (index.shape == state.index.shape and decide(torch.equal, index, state.index)):
        return None
    left = torch.ones(c.out.shape, dtype=torch.bool, device=c.out.device).scatter_(state.dim, index, False)
    scores = state.of.but(fills=[*state.of.fills, Term(left, state.of.origin)], finite=None)
    rest = c.out[left]
    if state.weights:
        if not decide(is_zero, rest):
            return None
        made = new_weights(scores, state.of.origin, state.of.origin, state.dim, state.held)
        made.use = state.use
        return made
    return scores.but() if decide(_is_masked, rest) else None


def _is_masked(x: Tensor) -> bool:
    return bool((x <= FILL).all())


def denominator(c: Operation) -> State | None:
    """``sum + extra``: a sink if it is more than a guard against 0/0."""
    stat: RowStatistic = c.state
    other = c.other()
    if stat.kind == "total":
        return same_state(c)
    if stat.kind != "sum":
        return None
    value = number(other)
    extra = other if value is None else 0.0 if value <= _EPSILON else value
    return replace(stat, origin=c.origin, extra=extra) if isinstance(stat.extra, float) and stat.extra == 0 else None


def normalized(c: Operation) -> State | None:
    """``exp / sum``: weights."""
    stat = c.look(c.other())
    state: Exponentials = c.state
    if not (
        isinstance(stat, RowStatistic)
        and stat.kind == "sum"
        and c.position == 0
        and stat.of.product is state.of.product
    ):
        return None
    scores = _with_extra(replace(stat, of=state.of), c.x)
    if scores is None:
        return None
    weights = new_weights(scores, state.origin, c.origin, stat.dim, None)
    weights.extended = False
    return weights


def masked_exponentials(c: Operation) -> State | None:
    """A mask of zeros and ones multiplied into the exponentials; or these times values, each key's vector."""
    other = c.other()
    return weighted_values(c) or (filled(c, other, "zero", 0.0) if is_indicator(other, c) else None)


def whole_exponentials(c: Operation) -> State | None:
    """Indexing that leaves every entry: a new dimension."""
    return same_state(c) if c.out.numel() == c.x.numel() else None


def sliced_weights(c: Operation) -> State | None:
    """A view, the sink's column dropped again, or the weights of some of the keys."""
    state: Weights = c.state
    if c.out.numel() == c.x.numel():
        return same_state(c)
    dim = state.keys_dim
    if dim is None:
        return None
    if c.out.dim() != c.x.dim():
        return _weights_of_heads(c, c.out, c.origin, c.moved)
    first = _first(c, dim)
    if first is None or any(n != m for j, (n, m) in enumerate(zip(c.out.shape, c.x.shape, strict=True)) if j != dim):
        return _weights_of_heads(c, c.out, c.origin, c.moved)
    return weights_of_keys(state, c.origin, dim, first, c.out.shape[dim])


def _weights_of_heads(c: Operation, out: Tensor, origin: Origin, moved: Callable[..., Entries | None]) -> State | None:
    """The weights of some of the heads, all keys of each."""
    state: Weights = c.state
    if state.key_range is not None or state.extended or state.own is not None or state.scores is None:
        return None
    mine = state.entries or Entries(source=state.origin, shape=tuple(c.x.shape))
    entries = moved(lambda x: mine if x is c.x else None)
    return None if entries is None else replace(state, origin=origin, entries=entries)


def piece_weights(c: Operation) -> list[State | None]:
    """Weights split along the keys: what each part is. ``c.out``: the parts."""
    state: Weights = c.state
    dim, made, first = state.keys_dim, list[State | None](), 0
    for one in c.out:
        others = one.dim() == c.x.dim() and all(
            j == dim or n == m for j, (n, m) in enumerate(zip(one.shape, c.x.shape, strict=True))
        )
        how = c.kind.axes(c.x, one, c.args, c.kwargs)
        origin = Origin(one.shape, birth="lost") if how is None else Origin(one.shape, how[0], state.origin, how[1])
        if others and dim is not None:
            made.append(weights_of_keys(state, origin, dim, first, one.shape[dim]))
            first += one.shape[dim]
        else:
            made.append(
                _weights_of_heads(c, one, origin, partial(_piece_entries, c, len(made))) if dim is not None else None
            )
    return made


def _piece_entries(c: Operation, i: int, of: EntriesOf) -> Entries | None:
    """The entries of one of the pieces that a tensor was split into."""
    mine = of(c.x)
    return None if mine is None else Entries(lambda numbers: c.func(numbers, *c.args[1:], **c.kwargs)[i], [mine])


def weights_of_keys(state: Weights, origin: Origin, dim: int, first: int, n: int) -> Weights:
    """The weights of ``n`` keys, from the ``first`` of those of ``state`` on; ``dim``: where its keys are now."""
    own = state.own
    if own is not None:
        at = replace(state, origin=own[1]).keys_dim
        cut = own[0].narrow(dim if at is None else at, first, n)
        own = cut, Origin(cut.shape, resized, own[1])
    start = first + (state.key_range[0] if state.key_range is not None else 0)
    whole = state.scores_origin.shape[state.dim] if state.scores_origin is not None else 0
    if state.extended and state.key_range is None and n == whole - 1:
        return replace(state, origin=origin, extended=False, own=own)
    return replace(state, origin=origin, own=own, key_range=(start, start + n))


def _first(c: Operation, dim: int) -> int | None:
    """The first key of a slice."""
    n = c.x.shape[dim]
    if c.name == "narrow":
        start = c.arg(2, "start")
        return start % n if isinstance(start, int) and c.arg(1, "dim") % c.x.dim() == dim else None
    if c.name == "aten::slice":
        start, _, step = slice(c.arg(2, "start"), c.arg(3, "end"), c.arg(4, "step", 1)).indices(n)
        return start if step == 1 and c.arg(1, "dim", 0) % c.x.dim() == dim else None
    index = c.args[1] if isinstance(c.args[1], tuple) else (c.args[1],)
    if any(not (i is Ellipsis or isinstance(i, slice)) for i in index):
        return None
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (c.x.dim() - len(index) + 1), *index[at + 1 :])
    if len(index) <= dim:
        return None
    start, _, step = index[dim].indices(n)
    return start if step == 1 else None


def weights_after_dropout(c: Operation) -> State | None:
    """Dropout: the weights are what they were before it."""
    p, training = c.arg(1, "p", 0.5), c.arg(2, "training", True)
    if not training or p == 0:
        return same_state(c)
    state: Weights = c.state
    return replace(state, origin=c.origin, own=state.own or (c.x, state.origin), dropout=float(p))


def mixed_weights(c: Operation) -> State | None:
    """Anything else done to weights before they meet the values."""
    state: Weights = c.state
    if not isinstance(c.out, Tensor) or c.out.shape != c.x.shape:
        return None
    if c.kind.arithmetic in ("add", "sub") and isinstance(other := c.look(c.other()), Weights):
        made = _joined_weights(c, state, other)
        if made is not None:
            return made
    if c.kind.sums_axis and (state.scores is None or not keeps_axes(c, state.scores)):
        return None
    return replace(state, own=state.own or (c.x, state.origin), mixed=[*state.mixed, c.name])


def _joined_weights(c: Operation, state: Weights, other: Weights) -> State | None:
    """The sum or difference of the weights of two softmaxes, or of two heads of one."""
    if state.use is other.use and state.entries is other.entries:  # one softmax twice, as gradients are passed through
        return None
    if state.scores is None or other.scores is None or other.origin.shape != state.origin.shape:
        return None
    name = "the sum of two softmaxes" if c.kind.arithmetic == "add" else "the difference of two softmaxes"
    if other.use is not None and other.use is not state.use:
        other.use.done = True
    mixed = [*(x for x in state.mixed if x != name), name]
    joined = [*state.joined, (replace(other, mixed=[*other.mixed, name]), c.other()), *other.joined]
    return replace(state, own=state.own or (c.x, state.origin), mixed=mixed, joined=joined)


def multiplied_weights(c: Operation) -> State | None:
    """Weights times values, each key's vector times its weight; or times a gate."""
    made = weighted_values(c) or mixed_weights(c)
    if isinstance(made, Weights) and made.scores is None and made.origin.shape == getattr(c.other(), "shape", None):
        made.met = c.other()
    return made


def pooled_values(c: Operation) -> State | None:
    """A sum over the axis of a softmax that had a weight for each feature of each position, and met values as many."""
    state: Weights = c.state
    dim = c.arg(1, "dim")
    if state.met is None or not isinstance(dim, int) or dim % c.x.dim() != state.dim or state.dim == c.x.dim() - 1:
        return None
    if is_indicator(state.met, c) or any(a.birth == "feature" for a in state.origin.layout()[state.dim]):
        return None
    every = list(range(c.x.dim()))
    return WeightedValues(
        c.origin, weights=c.x, state=state, labels=every, v=state.met, v_labels=every, summed=[state.dim]
    )


def summed_values(c: Operation) -> State | None:
    """Weighted values are summed over some dimensions: a product of weights and values."""
    state: WeightedValues = c.state
    dim = c.arg(1, "dim")
    dims = [dim] if isinstance(dim, int) else list(dim) if isinstance(dim, (tuple, list)) else []
    if not dims or not isinstance(c.out, Tensor):
        return None
    return replace(state, summed=[d % c.x.dim() for d in dims])


def masked_weights(c: Operation) -> State | None:
    """Weights set to 0 where masked: what the model multiplies is what counts."""
    if number(c.arg(2, "value")) == 0:
        return same_state(c)
    return mixed_weights(c)


def where_weights(c: Operation) -> State | None:
    """``where`` of weights and zeros: weights set to 0 where masked."""
    others = [x for x in c.args if x is not c.x and not (isinstance(x, Tensor) and x.dtype == torch.bool)]
    zeros = all(number(x) == 0 if not isinstance(x, Tensor) else decide(is_zero, x) for x in others)
    return same_state(c) if zeros and isinstance(c.out, Tensor) and c.out.shape == c.x.shape else mixed_weights(c)


def summed_outputs(c: Operation) -> State | None:
    """Values weighted by one slice of the weights, added to those of another."""
    state: PartialOutput = c.state
    other = c.look(c.other())
    if number(c.other()) == 0:
        return same_state(c)
    if not isinstance(other, PartialOutput) or other.parts[0][0].use is not state.parts[0][0].use:
        return None
    if c.kwargs.get("alpha", 1) != 1 or c.out.shape != c.x.shape:
        return None
    return PartialOutput(c.origin, parts=[*state.parts, *other.parts])
