"""What following decides by values, and what it sees of memory: noted, so that a recognised run can be held against it.

What is done to a state depends on the operation and on shapes, and then a run of the same operations is known to do the
same. Where it depends on values it says so by :func:`decide`, and these are looked at again in every run; where it
depends on which tensors share memory, by :func:`see`. An operation that is followed only afterwards, when its tensors
may be gone, gets the answers that there were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...torch_internals.tensor_identity import version_of


class _Decisions(threading.local):
    """What was decided by the values of tensors in this thread: question, tensors, answer; None: nobody notes it."""

    noted: list[tuple[Callable[..., Any], tuple[Tensor, ...], Any]] | None = None
    #: What was seen of where tensors lie, in the same way: that is the same in every run of the same operations.
    seen: list[Any] | None = None
    #: What was decided and seen of an operation that is followed only now, when its tensors may be gone.
    answers: list[Any] | None = None
    sights: list[Any] | None = None
    #: How often a tensor was written to since it ran.
    since: Callable[[Tensor], int] | None = None


DECISIONS = _Decisions()


def forget() -> None:
    """Nothing is noted, and no answers are left: of a trace of this thread that was broken off."""
    vars(DECISIONS).clear()


def decide(ask: Callable[..., Any], *tensors: Tensor) -> Any:
    """Ask something of the values of tensors.

    Args:
        ask: a function of the tensors, which is the same object each time.
        tensors: arguments of operations.
    """
    answer = DECISIONS.answers.pop(0) if DECISIONS.answers else ask(*tensors)
    if DECISIONS.noted is not None:
        DECISIONS.noted.append((ask, tensors, answer))
    return answer


def see(look: Callable[..., Any], *tensors: Tensor) -> Any:
    """Look where tensors lie in memory. As :func:`decide`, but that a run of the same operations need not look again.

    Args:
        look: a function of the tensors. What it says depends on nothing but which of them share memory, and how.
        tensors: tensors of operations.
    """
    sight = DECISIONS.sights.pop(0) if DECISIONS.sights else look(*tensors)
    if DECISIONS.seen is not None:
        DECISIONS.seen.append(sight)
    return sight


def is_zero(x: Tensor) -> bool:
    """Whether all entries are 0; to be asked by :func:`decide`."""
    return not bool(x.any())


def version_then(x: Tensor) -> int:
    """How often a tensor had been written to, when the operation ran that is followed now; −1 where nobody counts."""
    return version_of(x) if DECISIONS.since is None else version_of(x) - DECISIONS.since(x)
