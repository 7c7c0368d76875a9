"""Modes that see every operator as it reaches a kernel, and the tensors in what an operator is given.

Function modes are public and see the Python functions that a model calls; what such a function is made of, only a
dispatch mode sees. Its class and the walk over nested arguments lie in modules with an underscore, which many libraries
import all the same; nothing public does either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .private import private

if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
else:
    TorchDispatchMode = private("torch.utils._python_dispatch", "TorchDispatchMode", "modes below the dispatcher")
    tree_leaves = private("torch.utils._pytree", "tree_leaves", "modes below the dispatcher")

__all__ = ["TorchDispatchMode", "tree_leaves"]
