"""At which key position each query is."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernel_call import KernelCall

# So many entries of a mask are looked at together: what is made of them has the same size.
_PART = 1 << 22


def query_positions(call: KernelCall, kind: str) -> Tensor | None:
    """The key position of every query of a call.

    A kernel that is causal by itself says it: query i is on its diagonal. With as many keys as queries, query i is at
    key i. With more keys (a cache), each query is at the last key that it may attend to, if a mask has these go up one
    by one; this holds for a static cache, whose end is masked, too. Else the last query is at the last key.

    Args:
        call: the whole call.
        kind: the site's kind; a cross-attention has no such positions.

    Returns:
        (B or 1) T, int64; None: queries and keys are not places in one sequence.
    """
    _, _, t, s = call.shape
    if kind.startswith("cross"):
        return None
    steps = torch.arange(t, device=call.device).unsqueeze(0)
    positions = call.diagonal.positions(steps)
    if positions is not None or t > s:
        return positions
    if t == s or call.mask is None:
        return steps + (s - t)
    last = last_allowed(call.mask, steps[0], s)
    return steps + (s - t) if last is None else last


def last_allowed(mask: Tensor, queries: Tensor, s: int, room: tuple[int, int] | None = None) -> Tensor | None:
    """(B or 1) T: where each query is, by the last key that it may attend to; None if these don't go up as they do.

    Padding may hide all keys of the first queries, and the own keys of the last ones: these are in line with the rest.

    Args:
        mask: bool, broadcastable to B H T S.
        queries: T, int64: which of the kernel's queries these are, in their order.
        s: S.
        room: the least and the largest key position that the first query of the kernel can have; a query whose last key
            is beyond them tells nothing.
    """
    t = len(queries)
    mask = mask[(None,) * (4 - mask.dim())].bool()
    if mask.shape[2] not in (1, t) or (mask.shape[2] == 1 and t > 1) or mask.shape[3] != s:
        return None
    rows = max(1, _PART // (mask.shape[0] * mask.shape[1] * s))
    parts = []
    for part in torch.split(mask, rows, 2):
        seen = part[:, 0] if part.shape[1] == 1 else part.any(1)
        found = s - 1 - seen.flip(-1).to(torch.uint8).argmax(-1)  # argmax: the first of the largest
        parts.append(torch.where(seen.any(-1), found, -1))
    last = torch.cat(parts, 1)
    # A query's last key is `ahead` keys beyond its row. On a diagonal that is one number, the offset, for all queries
    # but those whose own key padding hides: these fall short of it. So the offset is the largest.
    ahead, some = last - queries, last >= 0
    if room is not None:
        some &= (ahead >= room[0]) & (ahead <= room[1])
    ahead = torch.where(some, ahead, -s - int(queries[-1]))
    offset = ahead.amax(1, keepdim=True)
    on = some & (ahead == offset)
    sure = on.sum(1) >= min(t, 2)  # one of several is there in a mask that hides nothing but padding, too
    if not bool(sure.any()):
        return None
    # A batch entry of nothing but padding says nothing; the others stand for it.
    known = offset[sure][0]
    offset = torch.where(some.any(1, keepdim=True), offset, known)
    level = torch.where(on, last, -1).cummax(1).values  # what is behind the line stays where the line ended
    good = (sure.unsqueeze(1) | (offset == known)) & (~some | (last == level)).all(1, keepdim=True)
    return queries + offset if bool(good.all()) else None
