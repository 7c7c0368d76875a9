"""What a trace will take: the result of ``plan``, as data and as a table; and how much room there is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from os import PathLike

import torch

from ..attention.kernel_call import FIELDS, STORED
from ..calls.site import Site
from ..printable import printable
from ..recording.selection import Selection
from ..statistics.registry import named
from ..torch_internals.devices import size_of

_FEW = ("entropy", "top_k", "received")


@dataclass(frozen=True)
class PlannedCall:
    """What one call will take.

    Attributes:
        site: where it happens.
        step, tap: as in :class:`hookattn.Call`.
        shapes: of each field that is kept and that the call has.
        bytes: of each field; 0 for one that follows from others and is derived when it is read, and for a mask, bias or
            sinks that an earlier call keeps already. ``certificate``: fields that were not asked for, held for
            the certificate and for what follows from them.
        derived: bytes of the fields that are derived when they are read.
    """

    site: Site
    step: int
    tap: str
    shapes: dict[str, tuple[int, ...]]
    bytes: dict[str, int]
    derived: int = 0

    @property
    def total(self) -> int:
        """Bytes of all fields."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class MemoryPlan:
    """What a trace will take, beside what the model's forward takes anyway.

    Attributes:
        calls: one for each attention call, in execution order.
        total: bytes of all that is kept: held in memory, or in the file of ``to``.
        in_memory: bytes that are held at once: all, or with ``to`` those of three calls.
        free_memory: bytes that are free on the device where the fields are kept; None: nobody says, as on devices that
            torch cannot ask.
        free_disk: bytes that are free where the file will be; None without ``to``.
        advice: arguments of a trace that would fit, the least loss first; empty if this one fits.
        notes: what could not be told exactly.
        skipped: attention that a trace will not be able to read: path and reason.
    """

    calls: list[PlannedCall]
    total: int
    in_memory: int
    free_memory: int | None
    free_disk: int | None = None
    advice: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether there is room for it, as far as that is known."""
        held = self.free_memory is None or self.in_memory <= self.free_memory
        return held and (self.free_disk is None or self.total <= self.free_disk)

    def __repr__(self) -> str:
        return table(self)


def free_disk(path: str | PathLike[str]) -> int:
    """Bytes that are free where a file will be."""
    return shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free


def table(plan: MemoryPlan) -> str:
    """One line for each run of calls that take the same, and the totals."""
    names = list(dict.fromkeys(name for call in plan.calls for name in (*call.shapes, *call.bytes)))
    fields = [f for f in FIELDS if f in names] + [f for f in names if f not in FIELDS]
    lines = [("site", "kind", "calls", *fields, "bytes")]

    def alike(call: PlannedCall) -> tuple[object, ...]:
        return call.site.stack, call.site.kind, tuple(call.shapes.items())

    for _, group in groupby(plan.calls, alike):
        calls = list(group)
        first, last = calls[0], calls[-1]
        path = first.site.label if len(calls) == 1 else f"{first.site.label} … {last.site.label}"
        shapes = ["×".join(map(str, first.shapes[f])) if f in first.shapes else "–" for f in fields]
        kind = f"{first.site.stack} {first.site.kind}"
        lines.append((path, kind, str(len(calls)), *shapes, size_of(sum(c.total for c in calls))))
    sums = [size_of(sum(c.bytes.get(f, 0) for c in plan.calls)) for f in fields]
    lines.append(("total", "", str(len(plan.calls)), *sums, size_of(plan.total)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.append(room_sentence(plan))
    if later := sum(c.derived for c in plan.calls):
        most = max(c.derived for c in plan.calls)
        text.append(f"derived when read, and not held: {size_of(later)} in all, {size_of(most)} of the largest call")
    text.extend(f"would fit: {x}" for x in plan.advice)
    text.extend(f"note: {x}" for x in plan.notes)
    text.extend(f"skipped: {path}: {reason}" for path, reason in plan.skipped)
    return printable("\n".join(text), keep="\n")


def room_sentence(plan: MemoryPlan) -> str:
    """What it takes of what is free, as text."""
    says = "fits" if plan.fits else "does not fit"
    if plan.free_memory is None:
        says = "fits, as far as is known" if plan.fits else says
        memory = f"{size_of(plan.in_memory)} of memory, of which nobody says how much is free"
    else:
        memory = f"{size_of(plan.in_memory)} of {size_of(plan.free_memory)} of free memory"
    if plan.free_disk is None:
        return f"{says}: {memory}"
    return f"{says}: {size_of(plan.total)} of {size_of(plan.free_disk)} of free disk, {memory} at once"


def smaller(selection: Selection, streamed: bool) -> Iterator[tuple[str, Selection, bool]]:
    """Arguments of traces that take less room, the least loss first: as text, the selection, whether to a file."""
    lean = tuple(f for f in STORED if f in selection.capture)
    if not streamed:
        yield 'to="run.safetensors"', selection, True
    if selection.device is None or selection.device.type != "cpu":
        yield 'device="cpu"', replace(selection, device=torch.device("cpu")), streamed
    if lean and len(lean) < len(selection.capture):
        derived = "scores and weights are derived when they are read"
        why = derived if selection.derivable else "without scores and weights"
        yield f"capture={lean!r} ({why})", replace(selection, capture=frozenset(lean)), streamed
    if selection.dtype is None:
        yield "dtype=torch.float16", replace(selection, dtype=torch.float16), streamed
        if lean and len(lean) < len(selection.capture):
            both = replace(selection, capture=frozenset(lean), dtype=torch.float16)
            yield f"capture={lean!r}, dtype=torch.float16", both, streamed
    if selection.queries is None:
        yield "queries=slice(-1, None) (the last position)", replace(selection, queries=slice(-1, None)), streamed
    if not selection.statistics:
        few = replace(selection, capture=frozenset(), statistics=tuple(s for n in _FEW if (s := named(n)) is not None))
        yield f"capture={_FEW!r} (statistics, which grow with the length alone)", few, streamed
