"""The order in which the calls of several ranks ran, as far as it can be told."""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..calls.call import Call


class Key(NamedTuple):
    """Which call of a run.

    Attributes:
        path: of its site.
        step: the step.
        number: which of the calls of that site in that step, from 0.
    """

    path: str
    step: int
    number: int


def in_order(calls: Mapping[Key, Call], of_ranks: Sequence[Sequence[Key]]) -> list[Call]:
    """Calls step by step. In a step the order of each rank holds; between calls of different ranks that of their
    stacks (those that attend to another come after), then of layers, then of paths.

    Args:
        calls: the calls.
        of_ranks: which of them each rank has, in the order in which they ran there.
    """
    stacks = _stacks(calls, of_ranks)
    rank = {key: _place(key, call, stacks) for key, call in calls.items()}
    found: list[Call] = []
    for step in sorted({key.step for key in calls}):
        after: dict[Key, set[Key]] = {key: set() for key in calls if key.step == step}
        waits = dict.fromkeys(after, 0)
        for keys in of_ranks:
            own = [key for key in keys if key.step == step]
            for before, key in itertools.pairwise(own):
                if key not in after[before]:
                    after[before].add(key)
                    waits[key] += 1
        ready = [(rank[key], key) for key, n in waits.items() if n == 0]
        heapq.heapify(ready)
        while ready:
            _, key = heapq.heappop(ready)
            found.append(calls[key])
            for later in after[key]:
                waits[later] -= 1
                if not waits[later]:
                    heapq.heappush(ready, (rank[later], later))
        # Ranks that ran the same calls in different orders: no order is that of all.
        left = sorted((rank[key], key) for key, n in waits.items() if n)
        found += [calls[key] for _, key in left]
    return found


def _stacks(calls: Mapping[Key, Call], of_ranks: Sequence[Sequence[Key]]) -> dict[str, tuple[bool, int, str]]:
    """For each stack what tells whether it runs before another."""
    crosses = {call.site.stack for call in calls.values() if call.site.crosses}
    place: dict[str, int] = {}
    for keys in of_ranks:
        for i, stack in enumerate(dict.fromkeys(calls[key].site.stack for key in keys)):
            place[stack] = max(place.get(stack, 0), i)
    return {stack: (stack in crosses, i, stack) for stack, i in place.items()}


def _place(key: Key, call: Call, stacks: Mapping[str, tuple[bool, int, str]]) -> tuple[object, ...]:
    layer = -1 if call.site.layer is None else call.site.layer
    path = tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", key.path))
    return stacks[call.site.stack], layer, path, key.number
