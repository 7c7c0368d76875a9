"""Whether there is room for a trace: asked at the first large call of each forward, before anything of it is kept.

From one call and the number of modules of its class follows about how much a forward will keep. That costs next to
nothing, and mostly settles it. Where it does not, the forward is planned, on shapes alone and while it stands still.
"""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..attention.kernel_call import KernelCall
from ..calls.site import Site
from ..errors import TraceTooLargeError, TraceTooLargeWarning
from ..recording.room_check import Forward, RoomCheck
from ..recording.selection import Selection
from ..taps.active import paused
from ..torch_internals.devices import free_memory, random_state_kept, size_of
from ..torch_internals.isolation import isolated
from .byte_counts import SeenCalls
from .memory_plan import MemoryPlan, free_disk, room_sentence
from .plan import calls_on_shapes, plan_with_advice


class RoomGuard(RoomCheck):
    """Looks after one trace.

    Args:
        selection: what the trace keeps.
        to: the file that it is streamed to; None: it stays in memory.
    """

    def __init__(self, selection: Selection, to: str | PathLike[str] | None):
        self.selection, self.to = selection, to
        self._asked: dict[str, int] = {}  # class of an attention module -> the forward in which it was last asked about
        self._factor = 1.0  # what a plan found, as a part of what was expected

    def check(self, forward: Forward, call: KernelCall, site: Site) -> None:
        """Look at a large call that is about to be kept.

        Raises:
            TraceTooLargeError: the forward cannot be kept; says what would fit.
        """
        if self._asked.get(site.module) == forward.step:
            return
        self._asked[site.module] = forward.step
        device = call.device
        count = self._count(forward.classes, site.module)
        most = count * self.upper_bound(call)
        disk = None if self.to is None else free_disk(self.to)
        if self._has_room(most, most, free_memory(self.selection.device or device), disk):
            return
        with isolated(call.v):
            shapes = _shapes(call)
        one = self._expected(shapes, site, device, 1)
        total = int(one.total * count * self._factor)
        if self._has_room(total, one.total, one.free_memory, one.free_disk):
            return
        found = self._planned(forward, device)
        if found is None:
            expected = self._expected(shapes, site, device, count)
            warnings.warn(f"maybe {_say(expected)}", TraceTooLargeWarning, stacklevel=2)
            return
        largest = max((c.total for c in found.calls), default=0)
        if not self._has_room(found.total, largest, found.free_memory, found.free_disk):
            raise TraceTooLargeError(_say(found))
        self._factor *= found.total / total

    def _count(self, classes: list[type], kind: str) -> int:
        """How many calls in modules of a class a forward will make, if each of them makes one."""
        count = sum(cls.__name__ == kind for cls in classes)
        return max(1, count if self.selection.layers is None else min(count, len(self.selection.layers)))

    def upper_bound(self, call: KernelCall) -> int:
        """Bytes that are enough for all that can be kept of a call: no element is wider than 8."""
        b, h, t, s = call.shape
        square = b * h * t * s
        vectors = sum(x.numel() for x in (call.q, call.k, call.v) if x is not None) + b * h * t * call.v.shape[3]
        return 8 * (vectors + (4 + len(self.selection.statistics)) * square)

    def _expected(self, call: KernelCall, site: Site, device: torch.device, count: int) -> MemoryPlan:
        """A forward of so many calls that are all like this one."""
        return plan_with_advice(
            SeenCalls([(call, site, 0)] * count, device=device), replace(self.selection, layers=None), self.to
        )

    def _planned(self, forward: Forward, device: torch.device) -> MemoryPlan | None:
        """The forward that is running; None where it cannot be planned."""
        inputs = forward.inputs()
        if inputs is None:
            return None
        try:
            with paused(), forward.aside(), random_state_kept(device):
                return plan_with_advice(calls_on_shapes(forward.model, *inputs), self.selection, self.to)
        except Exception:  # noqa: BLE001 - whatever it is, it is no fault of the trace, which can go on
            return None

    def _has_room(self, total: int, largest: int, memory: int | None, disk: int | None) -> bool:
        held = total if disk is None else largest
        return (memory is None or held <= memory) and (disk is None or total <= disk)


def _shapes(call: KernelCall) -> KernelCall:
    """The call without values."""
    found: dict[str, Any] = {}
    for name in (f.name for f in fields(call)):
        x = getattr(call, name)
        found[name] = x.to("meta") if isinstance(x, Tensor) else x
    return KernelCall(**found)


def _say(plan: MemoryPlan) -> str:
    largest = max(plan.calls, key=lambda call: call.total)
    return (
        f"the trace {room_sentence(plan)}; of its {len(plan.calls)} calls, {largest.site.label} alone takes "
        f"{size_of(largest.total)}. What would fit: {'; '.join(plan.advice)}. hookattn.plan(model, inputs) has a table."
    )
