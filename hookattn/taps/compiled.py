"""Compiled code runs uncompiled in a traced thread: it can't be watched, and must not be compiled with our mode open.

The decision is made where torch asks, call by call, for the callback that compiles: other threads go on compiling, and
the trace notes it only if compiled code really ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..torch_internals import compilation
from ..torch_internals.code_patching import Patch
from .active import current
from .base import Tap

NOTE = "compiled code ran uncompiled while it was traced, so outputs may differ in the last bits from the compiled ones"


def body(original: Callable[..., Any], callback: Any) -> Any:
    """No compiling callback where a trace watches; what torch would do anyway elsewhere."""
    # None and False are torch's own answers for "nothing is compiled here".
    found = original(callback)
    tracing = current()
    if tracing is None or found is None or found is False:
        return found
    if tracing.compiling and not tracing.shapes_only:
        return found
    tracing.note(NOTE)
    compilation.count_no_frames()
    return None


def patches() -> Iterable[Patch]:
    """Only if anything can have been compiled at all."""
    evaluator = compilation.evaluator()
    if evaluator is not None:
        yield Patch(evaluator, compilation.STANCE, body)


TAP = Tap("compiled", patches=patches)
