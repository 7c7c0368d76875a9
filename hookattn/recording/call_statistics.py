"""Statistics beside the kernel: from one kernel call to its fields; and its certificate without a whole mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..attention.kernel_call import KernelCall
from ..attention.masks import Masked
from ..attention.positions import query_positions
from ..attention.score_inputs import Problem, hidden
from ..calls.certificate import rows_to_check
from ..calls.site import Site
from ..statistics.base import Statistic
from ..statistics.engine import compute
from .selection import grouped, restrict


def beside(
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
    rows = kept_rows(call, queries)
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
    return compute(Problem.of(grouped(own, groups), rows, positions), statistics), notes


def kept_rows(call: KernelCall, queries: Sequence[int] | slice | None) -> Tensor:
    """T: which rows of a whole call a selection keeps."""
    rows = torch.arange(call.q.shape[2], device=call.q.device)
    return rows if queries is None else rows[queries] if isinstance(queries, slice) else rows[list(queries)]


def sample(call: KernelCall, kept: Tensor, full: bool) -> tuple[KernelCall, Masked]:
    """The rows of a call that are checked, with the complete mask of these rows alone.

    Args:
        call: restricted to what is kept; its mask is what the kernel was given.
        kept: T, the query rows that it was restricted to.
        full: whether all rows are checked.
    """
    own, device = replace(call), call.q.device
    rows = rows_to_check(call.q.shape[2], full)
    restrict(own, None, rows)
    mask = own.mask
    if call.causal or call.window is not None:
        at = kept[rows] + call.offset
        seen = ~hidden(at, slice(0, call.k.shape[2]), call.causal, call.window).view(1, 1, len(at), -1)
        mask = seen if mask is None else mask.bool() & seen
    elif mask is not None:
        mask = mask.bool()
    whole = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device) if mask is None else mask
    return own, Masked(whole, mask, mask is not None and not bool(mask.any(-1).all()))
