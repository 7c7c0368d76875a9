"""What a backward pass runs a second time, where somebody changes what attention does.

Activation checkpointing throws away what a part of a model has computed, and runs that part again in the backward pass.
The gradients are right only if it gets there what it got the first time: the same changes, though the trace may have
ended by then, and in whichever thread the backward pass runs that part (on a GPU it has one of its own). Nothing is
recorded of it, since the first run was.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..taps.active import current, paused


class RunAgain:
    """A function of a model: its first run is part of the trace that runs then, each later one is given the same.

    Args:
        function: the part of the model.
        step: tells the number of the step that runs.
        attached: attaches who listens once more while a block runs, in the thread that it is called in, to a part of
            the model that first ran in this step.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        step: Callable[[], int],
        attached: Callable[[int], AbstractContextManager[None]],
    ):
        self._function, self._current_step, self._attached = function, step, attached
        self._step: int | None = None  # of the first run

    def ran(self) -> None:
        """The function, or what it is of, has just run for the first time."""
        self._step = self._current_step()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._step is None:
            self._step = 0
            out = self._function(*args, **kwargs)
            self.ran()
            return out
        # Attached anew even where the trace still runs: a backward pass that is begun under its mode runs without it.
        running = current()
        with nullcontext() if running is None else running.aside(), paused(), self._attached(self._step):
            return self._function(*args, **kwargs)
