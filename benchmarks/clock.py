"""Timing: every variant runs once in each round, so that a drift of the machine hits all of them alike.

The order of a round is drawn anew, and before a short run comes an untraced forward that is not timed: what a variant
leaves behind in the caches (a file that was written, say) is no cost of the next. What is over in less than a fiftieth
of a second runs several times in a row and counts as their mean, whoever it is: one run of a millisecond measures
whatever else the processor did in it.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

MOST, LEAST = 100, 3
_LONG = 0.5  # seconds of a run that is not repeated before the rounds
_SHORT = 0.1  # seconds of a run before which an untraced forward runs
_SAMPLE, _OFTEN = 0.02, 20  # seconds that one measurement takes, in so many runs at most
_SLOW = 8  # a variant that takes so many untraced forwards runs in some rounds alone


@dataclass
class Variant:
    """One way to run a forward.

    Attributes:
        name: the row of the table.
        run: runs it once; what it returns is kept until the clock has stopped.
        around: entered before the clock starts and left after it stops.
        after: what to do when the clock has stopped (a file that goes).
        kept: bytes that it keeps on the model's device, if they are known.
        host, disk: bytes that it puts into host memory or into a file.
        peer: whether it is somebody else's.
        forwards: of the model, that it runs.
        context: whether no bar is about it: it may run in fewer rounds.
    """

    name: str
    run: Callable[[], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    after: Callable[[], None] = lambda: None
    kept: int | None = None
    host: int = 0
    disk: int = 0
    peer: bool = False
    forwards: int = 1
    context: bool = False


@dataclass
class Timed:
    """The seconds of one variant, by round, and the most memory that one run took, if somebody looked."""

    variant: Variant
    seconds: dict[int, float] = field(default_factory=dict)
    failed: str | None = None
    peak: int | None = None


Clock = Callable[[Callable[[], Any]], float]


def cpu_clock(run: Callable[[], Any]) -> float:
    """Seconds by the wall."""
    start = time.perf_counter()
    kept = run()
    spent = time.perf_counter() - start
    del kept
    return spent


def process_clock(run: Callable[[], Any]) -> float:
    """Seconds of this process on its cores: for one thread on a machine that others use too; waiting does not count."""
    start = time.process_time()
    kept = run()
    spent = time.process_time() - start
    del kept
    return spent


def cuda_clock(run: Callable[[], Any]) -> float:
    """Seconds between two events of the current stream; what was queued before is waited for."""
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    kept = run()
    end.record()
    torch.cuda.synchronize()
    del kept
    return start.elapsed_time(end) / 1e3  # type: ignore[no-any-return]


def clock_of(device: torch.device, busy: bool = False) -> Clock:
    """The clock of a device; ``busy``: of a machine that others use too."""
    if device.type == "cuda":
        return cuda_clock
    return process_clock if busy else cpu_clock


def once(variant: Variant, clock: Clock, times: int = 1) -> float:
    """Seconds of one run, as the mean of some in a row."""

    def several() -> Any:
        for _ in range(times - 1):
            variant.run()
        return variant.run()

    with variant.around():
        spent = clock(several) / times
    variant.after()
    return spent


def _times(seconds: float) -> int:
    """How often in a row something runs that takes so long."""
    return max(1, min(_OFTEN, int(_SAMPLE / max(seconds, 1e-9))))


def time_all(
    variants: Sequence[Variant],
    clock: Clock,
    seconds: float,
    rounds: int = 0,
    context_every: int = 1,
    peak: Callable[[Variant], int | None] | None = None,
) -> list[Timed]:
    """Time every variant against the first.

    Args:
        variants: the first is what the others are compared with.
        clock: measures one run.
        seconds: about how long the rounds may take; 3 to 100 of them. What no bar is about and takes an
            eighth of that at once runs in one round alone, and after twice the time no further round begins.
        rounds: exactly so many rounds instead.
        context_every: what no bar is about runs in every such round alone.
        peak: the most memory that a run takes; runs each variant once more, before the rounds.
    """
    found = [Timed(v) for v in variants]
    first = [_warm(timed, clock, math.inf if rounds else seconds / 8, peak) for timed in found]
    strides = [max(1, min(20, int(s / (_SLOW * first[0])))) for s in first]
    strides = [max(n, context_every) if v.context else n for v, n in zip(variants, strides, strict=True)]
    if not rounds:
        long = [v.context and s > seconds / 8 for v, s in zip(variants, first, strict=True)]
        strides = [MOST if one else n for one, n in zip(long, strides, strict=True)]
    warming = first[0] if first[0] < _SHORT else 0.0
    times = [_times(s) for s in first]
    one_round = sum((k * s + warming) / n for s, n, k in zip(first, strides, times, strict=True))
    end = math.inf if rounds else time.perf_counter() + 2 * seconds
    rounds = rounds or max(LEAST, min(MOST, int(seconds / max(one_round, 1e-9))))
    order, draw = list(zip(found, strides, times, strict=True)), random.Random(0)
    for i in range(rounds):
        if i and time.perf_counter() > end:
            break
        draw.shuffle(order)
        for timed, stride, often in order:
            if timed.failed is None and i % stride == 0:
                if first[0] < _SHORT:
                    variants[0].run()
                timed.seconds[i] = once(timed.variant, clock, often)
    return found


def _warm(timed: Timed, clock: Clock, long: float, peak: Callable[[Variant], int | None] | None) -> float:
    """Seconds of a later run, or of the first if it took ``long``; 0 where a peer cannot run this."""
    try:
        spent = once(timed.variant, clock)
        if peak is not None:
            timed.peak = peak(timed.variant)
            # A run of half a second is warm enough after two.
            long = min(long, _LONG)
        return spent if spent > long else once(timed.variant, clock)
    except Exception as error:
        if not timed.variant.peer:
            raise
        timed.failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return 0.0


def median_of(run: Callable[[], Any], clock: Clock, rounds: int) -> float:
    """Seconds of one thing alone: the median of some rounds, after one that does not count."""
    run()
    return statistics.median(clock(run) for _ in range(rounds))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return statistics.median(ordered), ordered[quarter], ordered[-1 - quarter]


def compare(timed: Timed, base: Timed) -> tuple[float, float, float]:
    """The ratio of two variants: median and quartiles of the ratios of each round."""
    return quartiles([s / base.seconds[i] for i, s in timed.seconds.items() if i in base.seconds])


def added(timed: Timed, base: Timed) -> float:
    """Median of the seconds that a variant takes beyond another, round by round."""
    return statistics.median(s - base.seconds[i] for i, s in timed.seconds.items() if i in base.seconds)
