"""Memory for what is kept: on the CPU, large tensors lie in huge pages where the system has them.

The first write to each page of fresh memory interrupts the processor, which for ordinary pages of 4 KiB takes longer
than the arithmetic that fills them.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LARGE = 2 << 20
"""Bytes of the usual huge page: what is smaller is left to the allocator."""


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As ``torch.empty``."""
    made = torch.empty(shape, dtype=dtype, device=device)
    _advise([made])
    return made


def laid_as(new: Tensor, x: Tensor) -> Tensor:
    """A tensor that lies in memory as another of its shape does: a view that fits the one fits it, too. Where the other
    has entries that share memory, each of these has its own; gradients go through."""
    if new.stride() == x.stride() and new.dtype == x.dtype:
        return new
    return torch.empty_like(x, requires_grad=False).copy_(new)


def copies(several: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous copies, each with a storage of its own; small ones that are large together mostly lie side by side."""
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in several]
    _advise(made)
    return [own.copy_(x) for own, x in zip(made, several, strict=True)]


def _advise(several: Sequence[Tensor]) -> None:
    """Ask for huge pages; advice that the system can't follow changes nothing."""
    if sum(x.nbytes for x in several if x.device.type == "cpu") < LARGE or (madvise := _madvise()) is None:
        return
    for x in several:
        if x.device.type == "cpu" and x.numel():
            first = x.data_ptr() & -mmap.PAGESIZE
            madvise(first, x.data_ptr() + x.nbytes - first, mmap.MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's call; None where it has none, or no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found
