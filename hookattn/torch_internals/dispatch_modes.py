"""Modes that see every operator as it reaches a kernel, what an operator is made of, and the tensors it is given.

Function modes are public and see the Python functions that a model calls; what such a function is made of, only a
dispatch mode sees. Its class and the walk over nested arguments lie in modules with an underscore, which many libraries
import all the same; nothing public does either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .private import private
from .undo import Change

if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
else:
    TorchDispatchMode = private("torch.utils._python_dispatch", "TorchDispatchMode", "modes below the dispatcher")
    tree_leaves = private("torch.utils._pytree", "tree_leaves", "modes below the dispatcher")

_PIECE = "readings of native calls from inside"
_count: Any = private("torch._C", "_len_torch_dispatch_stack", _PIECE)
_push: Any = private("torch._C", "_push_on_torch_dispatch_stack", _PIECE)
_pop: Any = private("torch._C", "_pop_torch_dispatch_stack", _PIECE)
_below_autograd: Any = private("torch._C", "_AutoDispatchBelowAutograd", _PIECE)
_dispatch_key: Any = private("torch._C", "DispatchKey", _PIECE)

__all__ = ["TorchDispatchMode", "dispatch_modes", "has_own_kernel", "opened", "run_kernel", "tree_leaves"]


def dispatch_modes() -> int:
    """How many dispatch modes are on in this thread."""
    return int(_count())


class opened(Change):
    """A dispatch mode is open while a block runs: ``with mode:``, but put back whatever happens."""

    __slots__ = ("_before", "_mode")

    def __init__(self, mode: TorchDispatchMode):
        self._mode, self._before = mode, dispatch_modes()

    def make(self) -> None:
        _push(self._mode)

    def undo(self) -> None:
        while dispatch_modes() > self._before:
            _pop(None)


def has_own_kernel(operator: Any, device: str) -> bool:
    """Whether an operator (an overload) has a kernel made for a type of device."""
    return bool(operator.has_kernel_for_dispatch_key(getattr(_dispatch_key, device.upper())))


def run_kernel(operator: Any, device: str, *args: Any, **kwargs: Any) -> Any:
    """Run an operator's kernel for a type of device with the dispatch modes that are on still on.

    A mode is off while what it was told of runs, so that it never sees what an operator is made of. Here the
    dispatcher is left out for the operator itself; for all that its kernel calls it is as it would be, below autograd.
    """
    with _below_autograd():
        return operator._op_dk(getattr(_dispatch_key, device.upper()), *args, **kwargs)
