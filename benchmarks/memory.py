"""Peak memory of one run, and how much there is."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .clock import Variant

Made = TypeVar("Made")


def peak(variant: Variant, device: torch.device) -> int | None:
    """Bytes beyond what was allocated before, at the highest point of one run; None where the system does not tell."""
    with variant.around():
        found = _cuda_peak(variant.run) if device.type == "cuda" else _cpu_peak(variant.run)
    variant.after()
    return found


def _cuda_peak(run: Callable[[], Any]) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    del kept
    return int(found)


def _cpu_peak(run: Callable[[], Any]) -> int | None:
    """By the resident set's high-water mark, which Linux lets a process reset; freed memory is given back before."""
    before = _resident()
    if before is None:
        return None
    kept = run()
    found = _status("VmHWM") - before
    del kept
    return max(found, 0)


def growth(make: Callable[[], Made]) -> tuple[Made, int | None]:
    """What is made, and how much larger the process's resident memory is with it; None where the system doesn't tell.

    With an allocator that keeps what is freed it is no smaller than the highest point of the making.
    """
    before = _resident()
    made = make()
    after = _resident()
    return made, None if before is None or after is None else after - before


def _resident() -> int | None:
    """Bytes of the process's resident memory, after what is free is given back; its high-water mark is reset."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}")
