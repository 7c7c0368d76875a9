"""Statistics beside the kernel: from one kernel call to its fields; and its certificate without a whole mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..attention.functional import compute_dtype
from ..attention.kernel_call import KernelCall
from ..attention.normalizers import is_softmax
from ..attention.positions import query_positions
from ..attention.score_inputs import ScoreInputs
from ..calls.certificate import tolerance
from ..calls.edits import AppliedEdit, edits_in_words, set_by_edits
from ..calls.site import Site
from ..statistics.base import Statistic
from ..statistics.engine import compute
from .selection import grouped, restrict
from .verification import kept_row_indices


def captured_statistics(
    call: KernelCall,
    statistics: Sequence[Statistic],
    site: Site,
    heads: Sequence[int] | None,
    queries: Sequence[int] | slice | None,
    edits: Sequence[AppliedEdit] = (),
) -> tuple[dict[str, Tensor | None], list[str]]:
    """The statistics of a call, of the selected heads and rows, and what a reader has to know of them.

    Args:
        call: the whole call, whose mask is what the kernel was given; left as it is. Where edits have set its scores or
            weights, it has them.
        edits: what was edited in it.
    """
    s = call.shape[3]
    undefined = _undefined(call)
    if undefined is not None:
        names = dict.fromkeys(name for x in statistics for name in x.fields)
        return names, [f"{', '.join(x.key for x in statistics)}: not defined here, as {undefined}"]
    positions = query_positions(call, site.kind) if any(x.positional for x in statistics) else None
    rows = kept_row_indices(call, queries)
    if queries is not None and positions is not None:
        positions = positions[:, rows]
    notes = [p for p in (x.problem(s) for x in statistics) if p is not None]
    lost = [x.key for x in statistics if x.positional] if positions is None else []
    if lost:
        notes.append(f"{', '.join(lost)}: not defined here, as queries and keys are not places in one sequence")
    if call.mixed:
        notes.append("statistics are of the softmax: the model changed the weights after it")
    if call.dropout:
        notes.append("statistics are of the weights before dropout")
    own = replace(call)
    groups = restrict(own, heads, queries)
    if not set_by_edits(edits, "weights"):
        return compute(ScoreInputs.of(grouped(own, groups), rows, positions), statistics), notes
    assert own.weights is not None, "the recorder asks for them"
    if not _may_be_shares(own.weights):
        names = dict.fromkeys(name for x in statistics for name in x.fields)
        why = f"as its weights are no distribution ({edits_in_words(edits)})"
        return names, [*notes, f"{', '.join(x.key for x in statistics)}: not defined here, {why}"]
    known = [x for x in statistics if not x.of_scores]
    found = compute(ScoreInputs.of_weights(own.weights, positions), known) if known else {}
    lost = [x.key for x in statistics if x.of_scores]
    if lost:
        notes.append(f"{', '.join(lost)}: not defined here, as its weights follow from no scores")
    return {name: found.get(name) for x in statistics for name in x.fields}, notes


def _may_be_shares(weights: Tensor) -> bool:
    """Whether none is negative, and no row sums to more than 1."""
    most = 1 + 4 * tolerance(weights.dtype)  # a row sum is of many roundings
    return bool(((weights >= 0).all() & (weights.sum(-1, dtype=compute_dtype(weights.dtype)) <= most).all()).item())


def _undefined(call: KernelCall) -> str | None:
    """Why a call has no statistics, which are of the softmax of scores; None: it has."""
    if not is_softmax(call.normalizer):
        return f"its weights are no softmax of its scores (call.normalizer is {call.normalizer!r})"
    if not call.is_product and call.scores is None:
        return f"its scores are no product of queries and keys (call.score is {call.score!r}) and were not formed"
    return None
