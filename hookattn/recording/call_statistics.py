"""Statistics beside the kernel: from one kernel call to its fields; and its certificate without a whole mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..attention.kernel_call import KernelCall
from ..attention.positions import query_positions
from ..attention.score_inputs import ScoreInputs
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
) -> tuple[dict[str, Tensor | None], list[str]]:
    """The statistics of a call, of the selected heads and rows, and what a reader has to know of them.

    Args:
        call: the whole call, whose mask is what the kernel was given; left as it is.
    """
    s = call.k.shape[2]
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
    return compute(ScoreInputs.of(grouped(own, groups), rows, positions), statistics), notes
