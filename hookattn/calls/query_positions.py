"""At which key position each query of a recorded call is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention.positions import last_allowed

if TYPE_CHECKING:
    from .call import Call


# Stacks that have as many queries as keys, and no cache.
_AHEAD = ("encoder", "vision")


def query_positions(call: Call, kept: int, s: int) -> Tensor | None:
    """(B or 1) T, int64; None: queries and keys are not places in one sequence.

    As :func:`hookattn.statistics.query_positions` has it for the kernel's own arguments. A record has no diagonal, but
    a mask that has it: where the last key that each query may attend to goes up as the queries do, it is there. Of
    selected rows it is there as in the whole call; a file of format 1.1 or older does not say how many rows that had.

    Args:
        call: the call.
        kept: T of what was kept.
        s: S.
    """
    if call.site.crosses:
        return None
    rows = torch.arange(kept) if call.queries is None else torch.tensor(call.queries)
    t = kept if call.queries is None else call.of_queries
    mask = call.get("mask") if call.has("mask") else None
    if t is None:
        return _of_unknown(call, rows, mask, s)
    # With as many keys as queries and no diagonal, a mask of padding must not be taken for one.
    found = None
    if mask is not None and (call.causal or t != s):
        # Rows that were left out need room, too; a row that leaves them none is padding, or looks ahead.
        room = None if call.queries is None else (min(0, s - t), s if call.causal else max(0, s - t))
        found = _by_mask(mask, rows, s, room)
    if found is None and t <= s:
        found = (rows + (s - t)).unsqueeze(0)
    return found


def _of_unknown(call: Call, rows: Tensor, mask: Tensor | None, s: int) -> Tensor | None:
    """Of selected rows, where it is not known of how many."""
    ahead = call.site.stack in _AHEAD
    if mask is not None and (call.causal or not ahead):
        found = _by_mask(mask, rows, s)
        alone = len(rows) == 1 and call.step == 0 and not call.causal
        if found is not None and not (alone and bool((found < rows.to(found)).any())):
            # One row of a first forward: nothing tells a cache before it from keys behind it.
            return None if alone and bool((found > rows.to(found)).any()) else found
    # The first forward has queries and keys alike, and a later one is not known.
    return rows.unsqueeze(0) if (call.step == 0 or ahead) and int(rows.max()) < s else None


def _by_mask(mask: Tensor, rows: Tensor, s: int, room: tuple[int, int] | None = None) -> Tensor | None:
    """:func:`last_allowed` of rows in any order, some of them more than once."""
    rows = rows.to(mask.device)
    if bool((rows.diff() > 0).all()):
        return last_allowed(mask, rows, s, room)
    distinct, back = rows.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    if mask.shape[-2] > 1:
        one_of = torch.empty_like(distinct).scatter_(0, back, torch.arange(len(rows), device=rows.device))
        mask = mask.index_select(-2, one_of)
    found = last_allowed(mask, distinct, s, room)
    return None if found is None else found[:, back]
