"""What the first trace of a new model costs beside its later ones: what is learned of a model is learned there."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import hookattn

from .clock import Clock, cpu_clock
from .models import sibling

MODELS, LATER = 7, 3


def first_over_later(
    make: Callable[[], nn.Module],
    inputs: Callable[[int], Any],
    *,
    models: int = MODELS,
    later: int = LATER,
    clock: Clock = cpu_clock,
) -> float:
    """Seconds of a model's first trace ÷ the median of its next ``later`` ones: the median over new models.

    Each model runs twice untraced before, so that what torch learns in a first forward is no trace's.

    Args:
        make: a new model each time.
        inputs: of the n-th model, counted from 0.
        models: how many.
        later: further traces of each.
        clock: measures one trace.
    """
    ratios = []
    with torch.no_grad():
        for n in range(models):
            model, x = make(), inputs(n)
            model(x)
            model(x)
            gc.collect()  # the model before has cycles, which would be collected while this one's first trace runs
            first = clock(lambda model=model, x=x: hookattn.trace(model, x))  # type: ignore[misc]
            rest = [clock(lambda model=model, x=x: hookattn.trace(model, x)) for _ in range(later)]  # type: ignore[misc]
            ratios.append(first / statistics.median(rest))
    return statistics.median(ratios)


def first_traces(model: nn.Module, x: Tensor, clock: Clock = cpu_clock, **options: int) -> dict[str, float]:
    """``first trace ÷ later ones`` of new models with these weights; and ``…, new length``, each with fewer tokens.

    What was learned of a class may spare its next model something. So the second number is nearer to what the first
    trace of a process takes, in which no shape has been seen yet.

    Args:
        model: token ids, B T, to logits; it is not traced itself.
        x: B T, of more tokens than models are made.
        clock: measures one trace.
        options: of :func:`first_over_later`.
    """
    return {
        "first trace ÷ later ones": first_over_later(lambda: sibling(model), lambda _: x, clock=clock, **options),
        "first trace ÷ later ones, new length": first_over_later(
            lambda: sibling(model), lambda n: x[:, : x.shape[1] - 1 - n].contiguous(), clock=clock, **options
        ),
    }
