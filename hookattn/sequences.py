"""Whose tokens the keys of a recorded call are, and whether they are of several steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .call import Call

if TYPE_CHECKING:
    from .trace import TraceData

_TOGETHER = "put together from "


def together(steps: int) -> str:
    """The note of a call that several steps were put together in; a file keeps it."""
    return f"{_TOGETHER}{steps} steps"


def stitched(call: Call) -> bool:
    """Whether several steps were put together in a call."""
    return any(note.startswith(_TOGETHER) for note in call.notes)


def of_inputs(call: Call, trace: TraceData) -> bool:
    """Whether its keys are those that tokens and padding are of: the encoder's, where a decoder reads one."""
    if call.site.crosses or call.site.stack == "encoder":
        return True
    return not any(c.site.crosses for c in trace.calls)
