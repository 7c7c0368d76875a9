"""The statistics that a GPU's kernels sum up, each in terms of those sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention.kernels.statistics import MOST_SETS, Range, kernel_sums
from ..attention.score_inputs import ScoreInputs
from .base import Statistic
from .entropy import Entropy
from .far_mass import FarMass
from .first_mass import FirstMass
from .local_mass import LocalMass
from .lse import LogSumExp
from .max_score import MaxScore
from .mean_distance import MeanDistance
from .offset_mass import OffsetMass
from .previous_mass import PreviousMass
from .received import Received
from .segment_mass import SegmentMass

# What each statistic is a sum of, looked up by its exact class: a subclass may write something else.
_SUMS: dict[type[Statistic], str] = {
    Entropy: "entropy",
    LogSumExp: "lse",
    MaxScore: "max_score",
    MeanDistance: "distance",
    Received: "received",
    FarMass: "total",
}
_FAR = 1 << 30  # more than there are keys, and what is added to it stays an int32, as the kernels count


def _around_query(first: int, last: int) -> Range:
    return Range(max(min(first, _FAR), -_FAR), max(min(last, _FAR), -_FAR), True)


def _window_of(x: Any) -> Range:
    return _around_query(1 - x.window, x.window - 1)


_RANGES: dict[type[Statistic], Callable[..., Range]] = {
    FirstMass: lambda x: Range(0, min(x.n, _FAR) - 1, False),
    LocalMass: _window_of,
    FarMass: _window_of,
    PreviousMass: lambda x: _around_query(-1, -1),
    OffsetMass: lambda x: _around_query(x.offset, x.offset),
}


def kernel_statistics(
    problem: ScoreInputs, statistics: Sequence[Statistic]
) -> tuple[dict[str, Tensor], list[Statistic]]:
    """Some statistics of a call by kernels of :mod:`hookattn.attention.kernels`.

    Args:
        problem: the call; its notes say what the kernels don't take.
        statistics: those that are defined for it.

    Returns:
        Field name → tensor; and the statistics that are left.
    """
    segments = _fitting([x for x in statistics if type(x) is SegmentMass])
    taken = [x for x in statistics if type(x) in _SUMS or type(x) in _RANGES or x in segments]
    left = [x for x in statistics if x not in taken]
    if left:
        _note(problem, left, "no kernel takes them")
    if not taken:
        return {}, left
    ranges = list(dict.fromkeys(_RANGES[type(x)](x) for x in taken if type(x) in _RANGES))
    found = kernel_sums(problem, [_SUMS[type(x)] for x in taken if type(x) in _SUMS], ranges, _marks(problem, segments))
    if isinstance(found, str):
        _note(problem, taken, found)
        return {}, list(statistics)
    fields: dict[str, Tensor] = {}
    masses = iter(torch.split(found["masses"], [x.columns() for x in segments], -1) if segments else ())
    for statistic in taken:
        kind = type(statistic)
        if kind is SegmentMass:
            fields[statistic.key] = next(masses).contiguous()
            continue
        value = found[_SUMS[kind]] if kind in _SUMS else None
        if kind in _RANGES:
            part = found["parts"][ranges.index(_RANGES[kind](statistic))]
            # Far mass is what the window leaves of the row; rounding shall not make it negative.
            value = part.clone() if value is None else (value - part).clamp_min_(0)
        assert value is not None
        fields[statistic.key] = value
    return fields, left


def _fitting(segments: list[Statistic]) -> list[Statistic]:
    """The first of them that together have no more sets than a kernel sums up at once."""
    made, n = [], 0
    for statistic in segments:
        if n + statistic.columns() <= MOST_SETS:
            made.append(statistic)
            n += statistic.columns()
    return made


def _marks(problem: ScoreInputs, segments: list[Statistic]) -> Tensor | None:
    """N S, bfloat16: 1 where a key is in a set of theirs, else 0; None without sets."""
    if not segments:
        return None
    s = problem.k.shape[2]
    marks = torch.zeros(sum(x.columns() for x in segments), s, dtype=torch.bfloat16, device=problem.q.device)
    for part, statistic in zip(torch.split(marks, [x.columns() for x in segments]), segments, strict=True):
        statistic.fill(part, slice(0, s), None)
    return marks


def _note(problem: ScoreInputs, statistics: Sequence[Statistic], reason: str) -> None:
    names = ", ".join(x.key for x in statistics)
    problem.notes.append(f"computed by torch's own operations: {names}: {reason}")
