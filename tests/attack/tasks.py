"""Tasks of asyncio and threads that use a model beside, or inside, a traced block of another."""

from __future__ import annotations

import asyncio
import random
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hookattn

from . import Figure
from .scenes import MODELS, left


def attack(rounds: int, seed: int = 0) -> Sequence[Figure]:
    draw = random.Random(seed)
    torch.set_num_threads(1)
    bad, tried = [], 0
    with tempfile.TemporaryDirectory() as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, build in MODELS.items():
            torch.manual_seed(0)
            model = build().eval()
            for scene in SCENES:
                for _ in range(max(1, rounds // (len(MODELS) * len(SCENES)))):
                    tried += 1
                    why = scene(model, draw) or "; ".join(left(model, Path(made)))
                    if why:
                        bad.append(f"{name}, {scene.__name__}: {why}")
    return [
        Figure("blocks beside tasks and threads", tried),
        Figure("of these with another's calls, without their own, or left", len(bad), 0, tuple(bad[:8])),
    ]


def ids(draw: random.Random, tokens: int) -> Tensor:
    return torch.tensor([[draw.randrange(2, 20) for _ in range(tokens)]])


async def use(model: nn.Module, given: Tensor, times: int) -> None:
    """A task that runs the model now and then."""
    for _ in range(times):
        model(given)
        await asyncio.sleep(0)


async def traced(model: nn.Module, given: Tensor, draw: random.Random) -> hookattn.Trace:
    """A task that traces one forward, and lets others run before and after it."""
    with hookattn.tracing(model) as trace:
        for _ in range(draw.randrange(4)):
            await asyncio.sleep(0)
        model(given)
        for _ in range(draw.randrange(4)):
            await asyncio.sleep(0)
    return trace


def same(trace: hookattn.Trace, alone: hookattn.Trace) -> str:
    """What a trace has that a trace of the same input, alone, has not."""
    ours, others = ([(c.site.path, c.shape, c.step) for c in t.calls] for t in (trace, alone))
    if ours != others:
        return f"{ours}, expected {others}"
    if trace.skipped:
        return f"skipped {trace.skipped}"
    equal = all(torch.equal(a.weights, b.weights) for a, b in zip(trace.calls, alone.calls, strict=True))
    return "" if equal else "other weights"


def beside_a_task(model: nn.Module, draw: random.Random) -> str:
    """Another task runs the same model."""
    mine, others = ids(draw, 3), ids(draw, 5)

    async def both() -> hookattn.Trace:
        work = asyncio.create_task(use(model, others, 6))
        trace = await traced(model, mine, draw)
        await work
        return trace

    return same(asyncio.run(both()), hookattn.trace(model, mine))


def two_traces(model: nn.Module, draw: random.Random) -> str:
    """Two tasks trace the same model at once."""
    first, second = ids(draw, 3), ids(draw, 6)

    async def both() -> list[hookattn.Trace]:
        return await asyncio.gather(traced(model, first, draw), traced(model, second, draw))

    found = asyncio.run(both())
    return "; ".join(filter(None, map(same, found, (hookattn.trace(model, first), hookattn.trace(model, second)))))


def a_task_of_the_block(model: nn.Module, draw: random.Random) -> str:
    """A task that is started in the block belongs to it."""
    given = ids(draw, 4)

    async def inside() -> hookattn.Trace:
        with hookattn.tracing(model) as trace:
            await asyncio.create_task(use(model, given, 1))
        return trace

    return same(asyncio.run(inside()), hookattn.trace(model, given))


def cancelled(model: nn.Module, draw: random.Random) -> str:
    """A task is cancelled in its block; what is left is for the caller to see."""
    given = ids(draw, 4)

    async def main() -> None:
        async def forever() -> None:
            with hookattn.tracing(model):
                model(given)
                await asyncio.sleep(60)

        task = asyncio.create_task(forever())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    return ""


def beside_a_thread(model: nn.Module, draw: random.Random) -> str:
    """A thread runs the same model, and another carries the block's context to it."""
    mine, others = ids(draw, 3), ids(draw, 5)

    async def carried() -> hookattn.Trace:
        with hookattn.tracing(model) as trace:
            await asyncio.to_thread(model, others)
            model(mine)
        return trace

    def blocked() -> hookattn.Trace:
        with hookattn.tracing(model) as trace:
            thread = threading.Thread(target=model, args=(others,))
            thread.start()
            model(mine)
            thread.join()
        return trace

    alone = hookattn.trace(model, mine)
    return same(blocked(), alone) or same(asyncio.run(carried()), alone)


SCENES: tuple[Callable[[Any, random.Random], str], ...] = (
    beside_a_task,
    two_traces,
    a_task_of_the_block,
    cancelled,
    beside_a_thread,
)
