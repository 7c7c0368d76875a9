"""Traces of changing models in one process for a long time, with whatever goes wrong now and then; a round is a second.

Each turn makes a model of its own, traces it in one of the ways below, and reads something. What the process holds is
measured again and again: its memory, descriptors, threads, exchanged functions, and the traces that are still alive.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hookattn
from hookattn import analyze
from hookattn.recording import live
from hookattn.recording.session import Session
from hookattn.torch_internals import undo
from hookattn.torch_internals.code_patching import exchanged

from . import Figure
from .scenes import Encoder, PlainModel, gpt2


class Turn:
    """One model and what is done with it."""

    def __init__(self, draw: random.Random, folder: Path):
        self.draw, self.folder = draw, folder
        build = draw.choice((PlainModel, Encoder, lambda: gpt2("sdpa"), lambda: gpt2("eager")))
        self.model: nn.Module = build().eval()
        self.ids: Tensor = torch.randint(2, 20, (draw.randint(1, 3), draw.randint(1, 24)))
        self.path = folder / "soak.safetensors"

    def traced(self) -> None:
        """One trace, of which a field is read."""
        trace = hookattn.trace(self.model, self.ids)
        assert trace.faithful, trace
        _ = self.draw.choice(trace.calls).weights

    def again(self) -> None:
        """Several traces of one model, which is learned."""
        for _ in range(4):
            self.traced()

    def streamed(self) -> None:
        """To a file, which is read back and looked at."""
        with torch.no_grad():
            hookattn.trace(self.model, self.ids, to=self.path)
        assert hookattn.load(self.path).calls[-1].weights.isfinite().all()

    def measured(self) -> None:
        """Statistics alone."""
        _ = hookattn.trace(self.model, self.ids, capture="entropy").calls[0].get("entropy")

    def in_threads(self) -> None:
        """Two threads trace two models, and one of them is used in a third."""
        other = Turn(self.draw, self.folder)
        threads = [threading.Thread(target=work) for work in (self.traced, other.traced, lambda: self.model(self.ids))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def cancelled(self) -> None:
        """A task that is cancelled in its block, beside another that traces."""

        async def forever() -> None:
            with hookattn.tracing(self.model):
                self.model(self.ids)
                await asyncio.sleep(60)

        async def main() -> None:
            task = asyncio.create_task(forever())
            await asyncio.sleep(0)
            self.traced()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(main())

    def raising(self) -> None:
        """A model that raises in the middle."""

        def fails(*_: Any) -> None:
            raise self.draw.choice((KeyboardInterrupt, MemoryError, ValueError))("in the model")

        module = self.draw.choice(list(self.model.modules()))
        handle = module.register_forward_hook(fails)
        with suppress(KeyboardInterrupt, MemoryError, ValueError):
            hookattn.trace(self.model, self.ids, to=self.path if self.draw.random() < 0.5 else None)
        handle.remove()

    def full(self) -> None:
        """A disk that is full."""
        with limited(self.draw.choice((0, 4096, 20_000))), suppress(hookattn.TraceWriteError):
            hookattn.trace(self.model, self.ids, to=self.folder / "full.safetensors")

    def kept(self) -> None:
        """An analyzer over a trace that stays for a while."""
        trace = hookattn.trace(self.model, self.ids)
        if self.ids.shape[1] > 1:
            str(analyze.report(trace))


WAYS: tuple[Callable[[Turn], None], ...] = (
    Turn.traced,
    Turn.again,
    Turn.streamed,
    Turn.measured,
    Turn.in_threads,
    Turn.cancelled,
    Turn.raising,
    Turn.full,
    Turn.kept,
)


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file can become larger than this."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def held() -> dict[str, float]:
    """What the process holds now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory, MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "exchanged functions": len(exchanged()),
        "running traces": len(live._live),
        "changes not put back": undo.mark(),
        "sessions alive": sum(isinstance(x, Session) for x in gc.get_objects()),
    }


def attack(rounds: int, seed: int = 0) -> Sequence[Figure]:
    """As many seconds as there are rounds."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    seen: list[dict[str, float]] = []
    turns, failed, ends = 0, [], time.monotonic() + rounds
    with tempfile.TemporaryDirectory() as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(made)
        for way in WAYS:  # what is loaded at its first use is loaded
            way(Turn(draw, folder))
        while time.monotonic() < ends:
            for _ in range(25):
                way = draw.choice(WAYS)
                turns += 1
                try:
                    way(Turn(draw, folder))
                except Exception as error:  # noqa: BLE001 - counted
                    failed.append(f"{way.__name__}: {type(error).__name__}: {error}")
            seen.append(held())
        left = sorted(path.name for path in folder.iterdir() if path.name != "soak.safetensors")
    figures = [
        Figure("models made and traced", turns),
        Figure("of these failed", len(failed), 0, tuple(failed[:8])),
        Figure("files left", len(left), 0, tuple(left[:8])),
    ]
    return [*figures, *grown(seen)]


def grown(seen: Sequence[dict[str, float]]) -> Iterator[Figure]:
    """How much more of everything there is in the last third than in the second."""
    third = max(1, len(seen) // 3)
    early, late = seen[third : 2 * third] or seen, seen[-third:]
    for name in seen[-1]:
        before, after = (statistics.median(x[name] for x in part) for part in (early, late))
        # An allocator does not give back all that is freed, and what it keeps depends on the order.
        allowed = 24 if name.startswith("memory") else 0
        yield Figure(f"{name}: {before:g} in the second third, grown by", max(0.0, after - before), allowed)
