"""Around our own arithmetic: no gradients, no autocast, and unseen by function modes, the user's own included."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class isolated:
    """Context manager for arithmetic on one tensor and others of its kind; what is not in force costs nothing."""

    __slots__ = ("_grad", "_others", "_x")

    def __init__(self, x: Tensor):
        self._x = x

    def __enter__(self) -> None:
        self._others: list[AbstractContextManager[Any]] = []
        self._grad = torch.is_grad_enabled()
        if self._grad:
            torch._C._set_grad_enabled(False)
        if torch._C._len_torch_function_stack() or type(self._x) is not Tensor:
            self._others.append(torch._C.DisableTorchFunction())
        if torch._C._is_any_autocast_enabled():
            self._others.append(torch.autocast(self._x.device.type, enabled=False))
        for other in self._others:
            other.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for other in reversed(self._others):
            other.__exit__(kind, error, trace)
        if self._grad:
            torch._C._set_grad_enabled(True)


def in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
