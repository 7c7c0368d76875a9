"""Counts the steps of a running trace: which forward a call belongs to, and who was called for it.

A step begins with the outermost module of the model that runs. Mostly that is the model itself, whose own hooks say
when it begins and ends. Where somebody calls a part of it (an encoder, the language model inside a wrapper, the
``forward`` of a module), no hook says so: the stack does, which is read only then. Parts that one method of the model
runs, each once, are one step: what ``generate`` runs before its first token is in the step that makes this token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..cached import cached_property
from ..errors import ModelError
from ..models.discovery import WatchPlan, within
from ..torch_internals.frames import count_calls, method_names, outermost


class Steps:
    """The steps of one trace.

    Args:
        plan: what is traced.
        begins: called whenever a step begins.
        ends_told: whether :meth:`model_ends` will be called.

    Attributes:
        number: of the step that runs, from 0; -1: none has begun.
    """

    def __init__(self, plan: WatchPlan, begins: Callable[[], None], ends_told: bool):
        self.number = -1
        self._plan, self._begins, self._ends_told = plan, begins, ends_told
        self._depth = 0  # calls of the model itself that run
        self._entries: list[str] = []  # of this step, the paths of what was called for it
        self._run: object = None  # the execution of the last entry; None: the first that the stack shows
        self._method: object = None  # the method of the model that this one runs in
        self._ran: set[str] = set()  # the sites that attended in this execution
        self._earlier: set[str] = set()  # and in those before it of this step
        self._together = False

    # The model itself

    def model_begins(self) -> bool:
        """The forward of the model itself begins; returns whether nothing of the model called it."""
        if self._depth and count_calls(self._plan.model) > 1:  # it calls itself
            self._depth += 1
            return False
        self._depth = int(self._ends_told)
        after_parts = self._entries and "" not in self._entries
        seen = outermost(self._plan.paths, self._method_names) if after_parts else None
        self._enter("", object() if self._ends_told else None, None if seen is None else seen.method)
        return True

    def model_ends(self) -> None:
        """It ends, by an error as well."""
        self._depth = max(0, self._depth - 1)

    # A call

    def of(self, path: str) -> tuple[int, str]:
        """The step of what attends now, and the path of its entry.

        Args:
            path: of the site.
        """
        if not self._depth:
            self._read_stack()
        entry = self._entries[-1] if self._entries else ""
        if path in self._earlier and not self._together:  # a part of what ran before runs again
            self._begin()
            self._entries.append(entry)
        self._ran.add(path)
        return self.number if self.number > 0 else 0, entry

    def _read_stack(self) -> None:
        seen = outermost(self._plan.paths, self._method_names)
        if seen is None or seen.run == self._run:
            return
        if self._run is None and self._entries and self._entries[-1] == seen.path:  # its beginning was told
            self._run = seen.run
        else:
            self._enter(seen.path, seen.run, seen.method)

    @cached_property
    def _method_names(self) -> frozenset[str]:
        return method_names(set(self._plan.classes))

    def _enter(self, path: str, run: object, method: object | None) -> None:
        """Something of the model was called from outside of it."""
        same_method = method is not None and method == self._method
        if self._together or (same_method and not any(within(path, entry) for entry in self._entries)):
            self._earlier |= self._ran
            self._ran = set()
        else:
            self._begin()
        self._entries.append(path)
        self._run, self._method = run, method

    def _begin(self) -> None:
        self.number += 1
        self._entries.clear()
        self._ran, self._earlier = set(), set()
        self._begins()

    # By hand

    @contextmanager
    def together(self) -> Iterator[int]:
        """What runs in the block is one step; gives its number.

        Raises:
            ModelError: inside another such block, or while the model runs.
        """
        if self._together:
            raise ModelError("trace.step() inside trace.step(): one step can't be part of another; end the first.")
        if self._depth or outermost(self._plan.paths, self._method_names) is not None:
            raise ModelError("trace.step() while the model runs: a forward is in one step; begin it before.")
        self._begin()
        self._together = True
        try:
            yield self.number
        finally:
            self._together = False
            self._entries.clear()
            self._run = self._method = None
