"""Streaming to disk, beside writing the same bytes with plain file writes; and how much memory it takes."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import hookattn
from hookattn.store.rawbytes import byte_blocks

from .clock import Clock, Variant
from .memory import peak


def streaming(model: nn.Module, x: Tensor, clock: Clock, rounds: int = 5) -> dict[str, float]:
    """What a streamed trace of everything costs.

    ``stream ÷ plain write``: (streamed trace − the same trace kept in memory) ÷ writing the same tensors, one after
    the other, to a file with ``write``; median over rounds in which all three run in turn. ``stream ÷ trace then
    write``: the streamed trace ÷ the sum of the two others. ``stream peak in calls``: peak memory beyond that of the
    untraced forward, in units of the largest call.
    """
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path, other = Path(folder, "trace.safetensors"), Path(folder, "plain.bin")

        def streamed() -> None:
            hookattn.trace(model, x, to=os.fspath(path))

        def in_memory() -> None:
            hookattn.trace(model, x)

        kept = [t for call in hookattn.trace(model, x) for name in call.fields if (t := call.get(name)) is not None]
        unique = list({t.data_ptr(): t for t in kept}.values())
        del kept
        seconds: list[tuple[float, float, float]] = []
        for i in range(rounds + 1):
            one = clock(in_memory)
            two = clock(streamed)
            path.unlink()
            three = _write(other, unique)
            other.unlink()
            if i:  # the first warms up
                seconds.append((one, two, three))
        written = sum(t.nbytes for t in unique)
        del unique
        largest = max(c.total for c in hookattn.plan(model, x, to=path).calls)
        untraced = peak(Variant("untraced", lambda: model(x)), x.device)
        during = peak(Variant("streamed", streamed), x.device)
    found = {
        "stream bytes": float(written),
        "plain write, bytes per second": written / statistics.median(c for _, _, c in seconds),
        "stream ÷ plain write": statistics.median((b - a) / c for a, b, c in seconds),
        "stream ÷ trace then write": statistics.median(b / (a + c) for a, b, c in seconds),
    }
    if untraced is not None and during is not None:
        found["stream peak in calls"] = (during - untraced) / largest
    return found


def _write(path: Path, tensors: list[Tensor]) -> float:
    start = time.perf_counter()
    with open(path, "wb") as file:
        for tensor in tensors:
            for block in byte_blocks(tensor):
                file.write(block)
    return time.perf_counter() - start
