"""At which key position each query of a recorded call is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..statistics.positions import last_allowed

if TYPE_CHECKING:
    from ..trace import Call


# Stacks that have as many queries as keys, and no cache.
_AHEAD = ("encoder", "vision")


def query_positions(call: Call, shape: tuple[int, int, int, int]) -> Tensor | None:
    """(B or 1) T, int64; None: queries and keys are not places in one sequence.

    As :func:`hookattn.statistics.query_positions` has it for the kernel's own arguments. A record has no diagonal, but
    a mask that has it: where the last key that each query may attend to goes up as the queries do, it is there. In a
    stack that looks ahead (an encoder, a vision tower) a query is at the key of its own number.

    Args:
        call: the call.
        shape: B H T S of what was kept.
    """
    _, _, t, s = shape
    if call.site.crosses:
        return None
    rows = torch.arange(t) if call.queries is None else torch.tensor(call.queries)
    mask = call.get("mask") if call.has("mask") else None
    square = t == s if call.queries is None else call.site.stack in _AHEAD
    if mask is not None and (call.causal or not square):
        found = last_allowed(mask, rows.to(mask.device), s)
        alone = call.queries is not None and t == 1 and call.step == 0 and not call.causal
        if found is not None and not (alone and bool((found < rows.to(found)).any())):
            # One row of a first forward: nothing tells a cache before it from keys behind it.
            return None if alone and bool((found > rows.to(found)).any()) else found
    if call.queries is None and t <= s:
        return (rows + (s - t)).unsqueeze(0)
    # Rows were selected: the first forward has queries and keys alike, and a later one is not known.
    known = call.step == 0 or call.site.stack in _AHEAD
    return rows.unsqueeze(0) if known and int(rows.max()) < s else None
