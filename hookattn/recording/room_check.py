"""What a running trace asks before it keeps a large call: whether there is room for it.

The trace knows this file alone. Who answers (:mod:`hookattn.planning.room`) plans forwards, which takes a trace to do;
so it is handed to the trace from outside, and told the few facts that it needs of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ..attention.kernel_call import KernelCall
from ..calls.site import Site

LARGE = 1 << 24
"""Elements of q (or of the output, where there is no q) times keys, up to which a call is not looked at."""


def is_large(call: KernelCall) -> bool:
    """Whether a call is looked at."""
    if call.q is not None and call.k is not None:
        return call.q.numel() * call.k.size(2) > LARGE
    b, h, t, s = call.shape
    return b * h * t * s * call.v.shape[3] > LARGE


@dataclass(frozen=True, slots=True)
class Forward:
    """The forward that is running.

    Attributes:
        step: its number in the trace.
        model: whose forward it is.
        classes: the classes of all its modules.
        inputs: returns the arguments that it was called with; None: nobody called the model itself.
        aside: makes a context without the trace's function mode.
    """

    step: int
    model: nn.Module
    classes: list[type]
    inputs: Callable[[], tuple[tuple[Any, ...], dict[str, Any]] | None]
    aside: Callable[[], AbstractContextManager[None]]


class RoomCheck(Protocol):
    """Looks after one trace."""

    def check(self, forward: Forward, call: KernelCall, site: Site) -> None:
        """Look at a large call that is about to be kept.

        Raises:
            TraceTooLargeError: the forward cannot be kept; says what would fit.
        """
