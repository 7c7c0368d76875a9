"""Microbatches that ran as steps, put together as batch entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..calls.call import Call
from ..errors import MergeError
from .joined_call import Part, Whole, count_along, join
from .joined_field import JoinedHistories


def steps_as_batches(calls: Sequence[Call]) -> list[Call]:
    """One call for each site, in step 0: the batch entries of its steps one after the other.

    Raises:
        MergeError: a site did not run in all steps, or its steps do not fit together.
    """
    sites: dict[tuple[str, int], list[Call]] = {}
    count: dict[tuple[str, int], int] = {}
    for call in calls:
        place = call.site.path, call.step
        number = count[place] = count.get(place, -1) + 1
        sites.setdefault((call.site.path, number), []).append(call)
    steps = sorted({call.step for call in calls})
    return [_one(found, steps) for found in sites.values()]


def _one(calls: Sequence[Call], steps: Sequence[int]) -> Call:
    where = calls[0].site.label
    ran = [call.step for call in calls]
    if sorted(ran) != list(steps):
        lacking = sorted(set(steps) - set(ran))
        raise MergeError(
            f"{where} did not run in step {lacking[0]}, and other sites did, so that its batches are not those of the "
            "others. Merge the sites that ran in all steps: trace.select(path=…)."
        )
    parts, start = [], 0
    for call in sorted(calls, key=lambda c: c.step):
        n = count_along(call, "B")
        if n is None:
            raise MergeError(
                f"{where}: nothing that was captured in step {call.step} tells how many batch entries it has."
            )
        parts.append(Part(call, f"step {call.step}", range(start, start + n), range(start, start + n)))
        start += n
    if len(parts) == 1:
        made = replace(calls[0], step=0)
        made.gradient = calls[0].gradient
        return made
    made = join(parts, Whole("B", start, None, False), JoinedHistories())
    made.step = 0
    made.shards = calls[0].shards
    return made
