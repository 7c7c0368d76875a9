"""Streaming to disk, beside writing the same bytes with plain file writes; and how much memory it takes."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import hookattn
from hookattn import Trace
from hookattn.store.rawbytes import byte_blocks
from hookattn.store.stream import Stream

from .clock import Clock, Variant, cpu_clock
from .memory import peak


def streaming(model: nn.Module, x: Tensor, clock: Clock, rounds: int = 9) -> dict[str, float]:
    """What a streamed trace of everything costs.

    ``stream ÷ plain write``: giving the calls of a trace, one by one, to the stream that ``to=`` writes with ÷ writing
    the same tensors, one after the other, to a file with ``write``. Both end with ``fsync``, by the wall; nothing is
    derived and no model runs between, since a forward takes ten times as long as a write, and varies by more than one.
    ``stream ÷ trace then write``: the streamed trace ÷ the sum of the trace kept in memory and of the plain write. Both
    are medians over rounds in which all of them run in turn. ``stream peak in calls``: peak memory beyond that of the
    untraced forward, in units of the largest call.
    """
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder, "trace.safetensors")
        written, ran = _rounds(model, x, clock, rounds, path)
        largest = max(c.total for c in hookattn.plan(model, x, to=path).calls)
        untraced = peak(Variant("untraced", lambda: model(x)), x.device)
        during = peak(Variant("streamed", lambda: hookattn.trace(model, x, to=path)), x.device)
    found = {
        "stream bytes": float(written),
        "plain write, bytes per second": written / statistics.median(r.plain for r in ran),
        "stream ÷ plain write": statistics.median(r.stream / r.plain for r in ran),
        "stream ÷ trace then write": statistics.median(r.streamed / (r.in_memory + r.written) for r in ran),
    }
    if untraced is not None and during is not None:
        found["stream peak in calls"] = (during - untraced) / largest
    return found


class _Round(NamedTuple):
    """Seconds: of the two traces and a plain write by the given clock, of the stream and a plain write by the wall."""

    in_memory: float
    streamed: float
    written: float
    stream: float
    plain: float


def _rounds(model: nn.Module, x: Tensor, clock: Clock, rounds: int, path: Path) -> tuple[int, list[_Round]]:
    """The bytes of the trace, and what each round took; no file is there when a write begins."""
    kept = hookattn.trace(model, x)
    for call in kept:
        call.fields = {name: call.get(name) for name in call.fields}
    tensors = list({t.data_ptr(): t for call in kept for t in call.fields.values() if isinstance(t, Tensor)}.values())

    def timed(run: Callable[[], object], by: Clock = clock) -> float:
        spent = by(run)
        path.unlink(missing_ok=True)
        return spent

    ran = []
    for _ in range(rounds + 1):
        one = _Round(
            timed(lambda: hookattn.trace(model, x)),
            timed(lambda: hookattn.trace(model, x, to=path)),
            timed(lambda: _write(path, tensors)),
            timed(lambda: _stream(path, kept), cpu_clock),
            timed(lambda: _write(path, tensors), cpu_clock),
        )
        ran.append(one)
    return sum(t.nbytes for t in tensors), ran[1:]  # the first warms up


def _stream(path: Path, kept: Trace) -> None:
    made = Trace(model=kept.model, selection=kept.selection)
    stream = Stream(path, made)
    for call in kept:
        made.calls.append(replace(call, fields=dict(call.fields)))
        stream.add(made.calls[-1])
    stream.finish()


def _write(path: Path, tensors: list[Tensor]) -> None:
    with open(path, "wb") as file:
        for tensor in tensors:
            for block in byte_blocks(tensor):
                file.write(block)
        file.flush()
        os.fsync(file.fileno())
