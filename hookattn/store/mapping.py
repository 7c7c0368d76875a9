"""Tensors over the pages of a file, read when they are touched.

The safetensors library maps too, and is not used for it, because ``safe_open``

- maps the whole file as private memory, which Linux refuses for a file larger than the machine's memory, and such
  traces are what streaming is for (with ``backend="pread"`` it aborts the process instead);
- hands out the same memory each time, so that a tensor changed in place reads as changed ever after;
- returns misaligned tensors, on which a vectorized loop may crash.
"""

from __future__ import annotations

import mmap
import platform
import sys
import weakref

import torch
from torch import Tensor

from .indexing import Selection

KEEP_FROM = 1 << 20
"""A smaller selection is copied: a mapping of its own is worth more than its bytes."""
LIVE_LIMIT = 256
"""How many mappings may live at once where each holds a file descriptor, of which a process often has 1024."""

# Python's mmap duplicates the descriptor for as long as the mapping lives, unless told not to (3.13 and later).
_HOLDS_DESCRIPTOR = sys.version_info < (3, 13)
_live: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def _no_reserve() -> int:
    # Without it, Linux wants memory enough for every page of a private mapping to be written to.
    known = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0
    return int(getattr(mmap, "MAP_NORESERVE", known))  # Python has the name from 3.13 on


_NO_RESERVE = _no_reserve()


def map_pages(descriptor: int, begin: int, end: int) -> mmap.mmap:
    """Map ``[begin, end)`` of a file, ``begin`` at a multiple of the allocation granularity; writes stay in memory.

    Raises:
        ValueError: the file ends before ``end``.
        OSError: the system refuses (no descriptors, no address space).
    """
    if sys.platform == "win32":
        return mmap.mmap(descriptor, end - begin, access=mmap.ACCESS_COPY, offset=begin)
    flags, protection = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    if sys.version_info >= (3, 13):
        return mmap.mmap(descriptor, end - begin, flags=flags, prot=protection, offset=begin, trackfd=False)
    return mmap.mmap(descriptor, end - begin, flags=flags, prot=protection, offset=begin)


def map_tensor(descriptor: int, start: int, dtype: torch.dtype, selection: Selection) -> Tensor:
    """The selected elements of the tensor whose data begins at byte ``start``: a view of the file's pages, or a copy.

    Raises:
        ValueError, OSError: as :func:`map_pages`.
    """
    if selection.span == 0:
        return torch.empty(selection.shape, dtype=dtype, device="cpu")
    item = dtype.itemsize
    begin = start + selection.offset * item
    end = begin + selection.span * item
    page = begin - begin % mmap.ALLOCATIONGRANULARITY
    pages = map_pages(descriptor, page, end)
    if begin % item:
        # torch takes a tensor's memory to be aligned, so these are gathered as bytes, which need not be.
        flat = torch.frombuffer(pages, dtype=torch.uint8, offset=begin - page)
        strides = tuple(stride * item for stride in selection.strides)
        gathered = flat.as_strided((*selection.shape, item), (*strides, 1)).clone(memory_format=torch.contiguous_format)
        return gathered.view(dtype).squeeze(-1)
    flat = torch.frombuffer(pages, dtype=dtype, offset=begin - page)
    view = flat.as_strided(selection.shape, selection.strides)
    if end - begin < KEEP_FROM or (_HOLDS_DESCRIPTOR and len(_live) >= LIVE_LIMIT):
        return view.clone(memory_format=torch.contiguous_format)
    _live.add(pages)
    return view
