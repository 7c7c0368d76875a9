"""Runs cases, and says in groups what came of them."""

from __future__ import annotations

import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch

from tests.beside import trace_beside

from .check import self_check
from .judge import Verdict, judge
from .source import build

BAD = ("wrong", "silent", "crash", "differs", "broken")
ORDER = ("right", "parts", "guessed", "skipped", "same", *BAD)
GROUPS = ("why", "layout", "heads", "product", "score", "normalizer", "chunking")


class Result(NamedTuple):
    """What came of one case: ``broken`` is the generator's own fault."""

    seed: int
    features: dict[str, str]
    verdict: Verdict


def one(seed: int, fixed: dict[str, str] | None = None, check: bool = True) -> Result:
    """Build, check and judge the case of a seed."""
    try:
        case = build(seed, fixed)
        wrong = self_check(case) if check else ""
    except Exception as e:  # noqa: BLE001 - counted, and shown
        at = traceback.extract_tb(e.__traceback__)[-1]
        return Result(
            seed, {}, Verdict("broken", f"{type(e).__name__}: {str(e)[:100]} {at.filename[-20:]}:{at.lineno}")
        )
    if wrong:
        return Result(seed, case.features, Verdict("broken", wrong))
    return Result(seed, case.features, judge(case))


def beside(seed: int, fixed: dict[str, str] | None = None) -> Result:
    """Trace the case of a seed several times and follow beside it: ``same``, or ``differs``; why runs were followed."""
    try:
        case = build(seed, fixed)
    except Exception as e:  # noqa: BLE001 - as in one
        return Result(seed, {}, Verdict("broken", f"{type(e).__name__}: {str(e)[:100]}"))
    try:
        with torch.no_grad():
            found = trace_beside(case.module, lambda: case.inputs)
    except Exception as e:  # noqa: BLE001 - whatever a trace raises is a finding
        return Result(seed, case.features, Verdict("crash", f"{type(e).__name__}: {str(e)[:110]}"))
    outcome = "differs" if found.problem else "same"
    return Result(seed, case.features, Verdict(outcome, found.problem, also=list(found.why) if found.followed else []))


def run(
    seeds: Iterable[int],
    processes: int = 1,
    fixed: dict[str, str] | None = None,
    how: Callable[[int, dict[str, str] | None], Result] = one,
) -> list[Result]:
    """The results of many seeds, in their order; ``how``: what each is put to, :func:`one` or :func:`beside`."""
    if processes == 1:
        return [how(s, fixed) for s in seeds]
    seeds = list(seeds)
    batches = [(seeds[i : i + 25], fixed, how) for i in range(0, len(seeds), 25)]
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return [r for part in pool.map(several, batches) for r in part]


def several(batch: tuple[Sequence[int], dict[str, str] | None, Callable[..., Result]]) -> list[Result]:
    """The results of some seeds, in this process."""
    seeds, fixed, how = batch
    return [how(s, fixed) for s in seeds]


def summary(results: list[Result]) -> str:
    """Counts by outcome, in one line."""
    counts = Counter(r.verdict.outcome for r in results)
    n = max(1, len(results))
    return ", ".join(f"{counts[o]} {o} ({counts[o] / n:.1%})" for o in ORDER if counts[o] or o in ("wrong", "silent"))


def grouped(results: list[Result], outcomes: tuple[str, ...], by: tuple[str, ...], most: int = 40) -> str:
    """The results with these outcomes by some features, most frequent first, with seeds."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for r in results:
        if r.verdict.outcome in outcomes:
            why = "".join("#" if c.isdigit() else c for c in r.verdict.why[:70])
            values = {"why": f"{r.verdict.outcome}: {why}", **r.features}
            groups[tuple(values.get(name, "-") for name in by)].append(r.seed)
    lines = []
    for key, seeds in sorted(groups.items(), key=lambda item: -len(item[1]))[:most]:
        lines.append(f"{len(seeds):5}  {' | '.join(key)}   seeds {' '.join(map(str, seeds[:6]))}")
    if len(groups) > most:
        lines.append(f"       and {len(groups) - most} groups more")
    return "\n".join(lines)


def telling(results: list[Result], outcomes: tuple[str, ...], most: int = 15) -> str:
    """The features that these outcomes have far more often than all cases."""
    chosen = [r for r in results if r.verdict.outcome in outcomes]
    every = Counter(item for r in results for item in r.features.items())
    here = Counter(item for r in chosen for item in r.features.items())
    rate = len(chosen) / max(1, len(results))
    rows = [
        (here[i] / every[i], here[i], every[i], i) for i in here if here[i] >= 3 and here[i] / every[i] > 1.5 * rate
    ]
    rows.sort(key=lambda row: -(row[0] - rate) * row[1] ** 0.5)
    return "\n".join(f"{share:7.0%} of {n:5}  {name} = {value}" for share, _, n, (name, value) in rows[:most])
