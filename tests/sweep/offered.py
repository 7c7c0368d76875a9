"""The attentions that an eager model hands out itself, against the weights of a trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import hookattn

from .cases import run

if TYPE_CHECKING:
    from .check import Row

TOLERANCE = 1e-4


def compare_offered(row: Row, model: nn.Module, inputs: dict[str, Any], trace: hookattn.Trace) -> None:
    """Find for each tensor of ``output_attentions=True`` the call that it is of, and note the largest distance."""
    try:
        output = run(model, inputs, output_attentions=True)
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, IndexError) as error:
        row.notes.append(f"offers no attentions: {type(error).__name__}")
        return
    offered = list(attentions(output))
    free = list(range(len(trace)))
    for name, theirs in offered:
        fits = {i: d for i in free if (d := distance(trace[i], theirs)) is not None}
        if not fits:
            row.problems.append(f"offered: {name} of shape {tuple(theirs.shape)} fits no call")
            continue
        best = min(fits, key=lambda i: fits[i])
        row.compared += 1
        row.offered = max(row.offered or 0.0, fits[best])
        if fits[best] > TOLERANCE:
            row.problems.append(f"offered: {name} {tuple(theirs.shape)} is {fits[best]:.2g} from the nearest call")
        else:
            free.remove(best)
    if not offered:
        row.notes.append("offers no attentions")


def distance(call: hookattn.Call, theirs: Tensor) -> float | None:
    """The largest distance over the rows that may attend to anything; None where the shapes do not fit."""
    mine = call.weights
    if theirs.shape != mine.shape:
        if theirs.numel() != mine.numel() or theirs.shape[-2:] != mine.shape[-2:]:
            return None
        theirs = theirs.reshape(mine.shape)
    rows = call.mask.expand_as(mine).any(-1)
    if not rows.any():
        return 0.0
    gap = (mine.double() - theirs.double()).abs()[rows].max().item()
    return gap if gap == gap else float("inf")


def attentions(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor under a key that names attentions."""
    if isinstance(output, Tensor):
        if "attention" in name and output.dim() >= 3 and output.is_floating_point():
            yield name, output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from attentions(value, f"{name}.{key}" if name else key)
    elif isinstance(output, (list, tuple)):
        for i, value in enumerate(output):
            yield from attentions(value, f"{name}[{i}]")


__all__ = ["attentions", "compare_offered", "distance", "torch"]
