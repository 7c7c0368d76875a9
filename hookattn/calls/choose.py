"""How many calls a view takes: one, or a stack of layers."""

from __future__ import annotations

import operator
from typing import Unpack

from ..errors import SelectionError
from .part import Part, Where, parts_of
from .parts import listed
from .trace_data import TraceData


def part_of_one_call(trace: TraceData, view: str, **where: Unpack[Where]) -> Part:
    """The part of a view of one call.

    Raises:
        SelectionError: no call fits, or several; says what there is.
        FieldNotCaptured: nothing that was captured tells the extents.
    """
    found = parts_of(trace, **where)
    if len(found) > 1:
        calls = [part.call for part in found]
        given = {name: list(dict.fromkeys(of(c) for c in calls)) for name, of in _NAMED.items()}
        apart = {name: values for name, values in given.items() if len(values) > 1}
        if len(apart) > 1:
            apart.pop("path", None)
        choice = ", ".join(f"{name}= of {listed(values)}" for name, values in apart.items())
        raise SelectionError(
            f"{view} draws one call, and {len(calls)} fit; give {choice or 'one of them, trace[i : i + 1]'}"
            + (", or put the steps together with trace.stitch()." if "step" in apart else ".")
        )
    return found[0]


_NAMED = {
    "layer": operator.attrgetter("site.layer"),
    "stack": operator.attrgetter("site.stack"),
    "kind": operator.attrgetter("site.kind"),
    "step": operator.attrgetter("step"),
    "path": operator.attrgetter("site.path"),
}


def parts_of_one_stack(trace: TraceData, view: str, **where: Unpack[Where]) -> list[Part]:
    """The parts of a view of many layers.

    Raises:
        SelectionError: several stacks, kinds or steps fit; says which.
    """
    parts = parts_of(trace, **where)
    for name, of in (
        ("stack", [p.call.site.stack for p in parts]),
        ("kind", [p.call.site.kind for p in parts]),
        ("step", [p.call.step for p in parts]),
    ):
        if len(set(of)) > 1:
            there = ", ".join(map(repr, dict.fromkeys(of)))
            more = ", or put the steps together with trace.stitch()" if name == "step" else ""
            raise SelectionError(f"{view} draws one {name}, and there are {there}; give {name}={more}.")
    return parts
