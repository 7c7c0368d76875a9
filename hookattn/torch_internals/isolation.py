"""Around our own arithmetic: no gradients, no autocast, and unseen by function modes, the user's own included.

``torch.no_grad``, ``torch.autocast`` and their kind do the same, each at the price of a small kernel, entered or not.
This runs several times a layer, so each is asked for whether it is in force, and only what is in force is left. Nor do
they survive an interrupt in their own last line; these are :class:`~hookattn.torch_internals.undo.Change`.
``DisableTorchFunction`` has no public name that leaves modes aside, too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .function_modes import depth
from .private import private
from .undo import Change

set_grad_enabled: Callable[[bool], None] = private("torch._C", "_set_grad_enabled", "arithmetic without gradients")
"""As ``torch.set_grad_enabled``, for who puts it back by hand."""
_autocast_enabled: Callable[[], bool] = private("torch._C", "_is_any_autocast_enabled", "arithmetic without autocast")
_DisableTorchFunction: Callable[[], AbstractContextManager[Any]] = private(
    "torch._C", "DisableTorchFunction", "arithmetic that no function mode sees"
)
_graph_task: Callable[[], int] = private("torch._C", "_current_graph_task_id", "checks for a backward pass")

_at_the_end: Callable[[Callable[[], None]], None] = private(
    "torch.autograd", "Variable._execution_engine.queue_callback", "gradients of calls"
)


def is_isolated(x: Tensor) -> bool:
    """Whether :class:`isolated` would change nothing: asked where each call counts (1.5 % of a toy)."""
    return not (torch.is_grad_enabled() or depth() or _autocast_enabled()) and type(x) is Tensor


class no_gradients(Change):
    """``torch.no_grad()``, but as a change that is put back whatever happens.

    Args:
        but: leave gradients as they are, on where they are on: what is made is to be in the graph.
    """

    __slots__ = ("_but", "_grad")

    def __init__(self, but: bool = False) -> None:
        self._grad, self._but = False, but

    def make(self) -> None:
        self._grad = not self._but and torch.is_grad_enabled()
        if self._grad:
            set_grad_enabled(False)

    def undo(self) -> None:
        if self._grad:
            set_grad_enabled(True)


class isolated(Change):
    """Context manager for arithmetic on one tensor and others of its kind; what is not in force costs nothing.

    Args:
        x: the tensor.
        but: leave gradients as they are, as in :class:`no_gradients`.
    """

    __slots__ = ("_autocast", "_but", "_grad", "_unseen", "_x")

    def __init__(self, x: Tensor, but: bool = False):
        self._x, self._but = x, but
        self._unseen: AbstractContextManager[Any] | None = None
        self._grad = False
        self._autocast = ""

    def make(self) -> None:
        # First, since modes see gradients being switched off, too. A tensor of another class may have a
        # __torch_function__ of its own, with no mode open at all.
        if depth() or type(self._x) is not Tensor:
            self._unseen = _DisableTorchFunction()
            self._unseen.__enter__()
        self._grad = not self._but and torch.is_grad_enabled()
        if self._grad:
            set_grad_enabled(False)
        if _autocast_enabled():
            device = self._x.device.type
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                self._autocast = device
                torch.set_autocast_enabled(device, False)

    def undo(self) -> None:
        if self._autocast:
            torch.set_autocast_enabled(self._autocast, True)
        if self._grad:
            set_grad_enabled(True)
        if self._unseen is not None:
            self._unseen.__exit__(None, None, None)


def in_backward() -> bool:
    """Whether a backward pass runs in this thread: checkpointed parts run again in it, and were traced already."""
    return _graph_task() != -1


def backward_number() -> int:
    """The number of the backward pass that runs in this thread; each has one of its own."""
    return _graph_task()


def at_the_end(function: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs in this thread has ended; not if it raises. Asked in a hook."""
    _at_the_end(function)
