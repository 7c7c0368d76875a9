"""Memory for what is kept: on the CPU, large tensors lie in huge pages where the system has them.

The first write to each page of fresh memory interrupts the processor, which for ordinary pages of 4 KiB takes longer
than the arithmetic that fills them. And what is kept lies apart from what the model allocates and frees.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 2 << 20
"""Bytes of the usual huge page: what is smaller is left to the allocator."""
_ALIGNED = 64  # as torch's own allocator does
_HUGE = getattr(mmap, "MADV_HUGEPAGE", None)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As ``torch.empty``."""
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and (room := _pages(size)) is not None:
        return torch.frombuffer(room, dtype=torch.uint8, count=size).view(dtype).view(*shape)
    return torch.empty(shape, dtype=dtype, device=device)


def copies(several: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous copies, each with a storage of its own, which lie side by side if they are large together."""
    if any(x.device.type != "cpu" for x in several):
        return [x.clone(memory_format=torch.contiguous_format) for x in several]
    places, size = [], 0
    for x in several:
        places.append(size)
        size += -(-x.nbytes // _ALIGNED) * _ALIGNED
    room = _pages(size)
    if room is None:
        return [x.clone(memory_format=torch.contiguous_format) for x in several]
    made = []
    for x, start in zip(several, places, strict=True):
        if not x.numel():
            made.append(x.clone(memory_format=torch.contiguous_format))
            continue
        flat = torch.frombuffer(room, dtype=torch.uint8, count=x.nbytes, offset=start)
        made.append(flat.view(x.dtype).view(x.shape).copy_(x))
    return made


def _pages(size: int) -> mmap.mmap | None:
    """Fresh memory in huge pages, for as long as somebody holds it; None: it is too little, or there are none."""
    if size < LARGE or _HUGE is None:
        return None
    try:
        room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        room.madvise(_HUGE)
    except OSError:  # none to be had: torch's allocator says so
        return None
    return room
