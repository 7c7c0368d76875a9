"""Means over pairs of tokens in plain loops and float64, to hold measures against."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hookattn.analyze import Measure, measure
from tests.analyze.build import Case

Related = Callable[[int, int, int], bool]
"""Of a batch entry, the place of a query and the place of a key."""


def words(b: int, s: int, vocabulary: Sequence[str], seed: int = 0) -> list[list[str]]:
    """B S random tokens."""
    drawn = random.Random(seed)
    return [[drawn.choice(vocabulary) for _ in range(s)] for _ in range(b)]


def values(
    made: Case, layer: int, related: Related, counts: Callable[[int, int, int], bool] | None = None
) -> tuple[Tensor, Tensor]:
    """(B H, H): the mean of the related weights over the rows that count, by default those with a related key open."""
    weights = made.weights[layer]
    b, h, t, s = weights.shape
    own, heads = torch.full((b, h), math.nan, dtype=torch.float64), torch.full((h,), math.nan, dtype=torch.float64)
    assert made.positions is not None
    for head in range(h):
        every: list[float] = []
        for i in range(b):
            found = []
            for row in range(t):
                place = int(made.positions[row])
                keys = [j for j in range(s) if made.real[i, j] and related(i, place, j)]
                if counts is None:
                    keys = [j for j in keys if made.mask[i, 0, row, j]]
                if made.rows[i, row] and (bool(keys) if counts is None else counts(i, place, len(keys))):
                    found.append(sum(float(weights[i, head, row, j]) for j in keys))
            if found:
                own[i, head] = sum(found) / len(found)
            every += found
        if every:
            heads[head] = sum(every) / len(every)
    return own, heads


def holds(of: Measure, made: Case, related: Related, counts: Any = None, real: Any = None, atol: float = 2e-6) -> None:
    """The measure is this mean, in every layer, by head and by example; and at least one value is a number."""
    numbers = 0
    for by in ("head", "example"):
        table = measure(made.trace, of, by=by, real=real)
        for layer, w in enumerate(made.weights):
            own, heads = values(made, layer, related, counts)
            expected = heads if by == "head" else own
            found = torch.tensor(table[table.call == layer][of.key].to_numpy()).view(expected.shape)
            torch.testing.assert_close(found, expected, atol=atol, rtol=0, equal_nan=True)
            assert table[table.call == layer]["head"].tolist()[: w.shape[1]] == list(
                made.trace[layer].heads or range(w.shape[1])
            )
            numbers += int((~expected.isnan()).sum())
    assert numbers, "nothing was compared"
