"""Peak memory of one run, and how much there is."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import torch

from .clock import Variant


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
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    kept = run()
    found = _status("VmHWM") - before
    del kept
    return max(found, 0)


def _status(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}")
