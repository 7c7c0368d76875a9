"""What it costs to read a default trace: one head beside all heads of a call, and the report on every head.

Every reading is of a trace of its own, so that none finds what the one before has derived.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import hookattn
from hookattn import Call, Trace, analyze

from .analysis import Layers, words
from .clock import Clock, Variant, cpu_clock
from .memory import peak


def one_head(
    tokens: int = 4096, heads: int = 12, *, rounds: int = 3, clock: Clock = cpu_clock, device: str = "cpu"
) -> dict[str, float]:
    """``one head ÷ all heads, time`` and ``…, memory``: the weights of one head of a call ÷ the weights of the call."""
    torch.manual_seed(0)
    with torch.no_grad():
        model, x = Layers(1, heads).to(device), torch.randn(1, tokens, 64 * heads, device=device)

        def call() -> Call:
            made = hookattn.trace(model, x)[0]
            _ = made.certificate  # of the whole call, whatever is read of it
            return made

        ways: dict[str, Callable[[Call], Any]] = {
            "one": lambda call: call.at(heads=heads // 2).weights,
            "all": lambda call: call.weights,
        }
        spent, most = _read(call, ways, rounds, clock, torch.device(device))
    found = {"all heads of a call, seconds": spent["all"], "one head ÷ all heads, time": spent["one"] / spent["all"]}
    if most:
        found["one head ÷ all heads, memory"] = most["one"] / most["all"]
    return found


def report(
    layers: int = 12,
    heads: int = 12,
    tokens: int = 512,
    *,
    rounds: int = 3,
    clock: Clock = cpu_clock,
    device: str = "cpu",
) -> dict[str, float]:
    """``report, seconds`` and ``report, peak in calls``: of all measures, in units of all fields of one call."""
    torch.manual_seed(0)
    with torch.no_grad():
        model, x = Layers(layers, heads).to(device), torch.randn(1, tokens, 64 * heads, device=device)
        text = [words(tokens)]

        def trace() -> Trace:
            return hookattn.trace(model, x, tokens=text)

        spent, most = _read(trace, {"report": analyze.report}, rounds, clock, torch.device(device))
        call = trace()[0]
        fields = sum(tensor.nbytes for name in call.fields if (tensor := call.get(name)) is not None)
    found = {"report, seconds": spent["report"]}
    if most:
        found["report, peak in calls"] = most["report"] / fields
    return found


def _read(
    make: Callable[[], Any], ways: dict[str, Callable[[Any], Any]], rounds: int, clock: Clock, device: torch.device
) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds (medians, in turn) and the most memory of each way to read what is made.

    The first round imports what reading needs and counts for nothing, the second looks at memory, the others at time.
    """
    spent: dict[str, list[float]] = {name: [] for name in ways}
    most: dict[str, int] = {}
    for i in range(rounds + 2):
        for name, read in ways.items():
            run = partial(read, make())
            if i == 1:
                found = peak(Variant(name, run), device)
                if found is not None:
                    most[name] = found
            else:
                took = clock(run)
                spent[name] += [took] if i else []
    return {name: statistics.median(several) for name, several in spent.items()}, most
