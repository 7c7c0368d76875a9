"""Where in a model a graph was made from a call stands: the module that a node of ``torch.fx`` belongs to.

A ``GraphModule`` (of ``torch.fx.symbolic_trace``, ``torch.export``, torchvision's feature extractors) runs as one
function in which the modules of the model are gone, and each node of its graph is a line. The line that runs says which
node it is, and a node says from which module it was made.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import fx, nn

from ..torch_internals.frames import running_line
from .wrappers import Unwrapped

UNKNOWN = (
    "a graph does not say from which modules its nodes were made; what ran in it is named by the nodes of the graph"
)

_ASSIGNED = re.compile(r"\s*(\w+)\s*(?::[^=]*)?=[^=]")
_INDEX = re.compile(r"\[['\"]?(\w+)['\"]?\]")
_PATH = re.compile(r"(?:\w+(?:\.\w+)*)?")


class Made(NamedTuple):
    """What a node was made from.

    Attributes:
        path: of the module, in the model that the graph was made from; of a node that does not say, its own name.
        module_class: the name of the module's class; "" where the node does not say.
    """

    path: str
    module_class: str


_known: WeakKeyDictionary[nn.Module, tuple[str, dict[str, Made]]] = WeakKeyDictionary()


class GraphSites:
    """The places in the graphs of one model.

    Args:
        unwrapped: gives the model without wrappers.

    Attributes:
        classes: path -> name of the class that a module had which is in no place of the model any more.
    """

    def __init__(self, unwrapped: Callable[[], Unwrapped]):
        self._unwrapped = unwrapped
        self.classes: dict[str, str] = {}

    def running(self, path: str) -> tuple[str, bool]:
        """The path of what runs, where the innermost module that runs is the one at ``path``.

        Returns:
            ``path``, if that is no graph; else that of the module that the running node was made from, below the path
            of its graph. And whether that is known.
        """
        unwrapped = self._unwrapped()
        module = unwrapped.real(unwrapped.root.get_submodule(path))
        if not isinstance(module, fx.GraphModule):
            return path, True
        line = running_line(module)
        if line is None:
            return path, True
        assigned = _ASSIGNED.match(linecache.getline(*line))
        made = None if assigned is None else _made(module).get(assigned.group(1))
        if made is None:  # the graph was changed and its code was not, or the code is somebody else's
            return path, False
        whole = ".".join(x for x in (self._base(path), made.path) if x)
        if made.module_class:
            self.classes[whole] = made.module_class
        return whole, bool(made.module_class)

    def _base(self, path: str) -> str:
        """The path that a graph's own paths count from: its own, or that of the graph that it is a branch of."""
        outer, _, name = path.rpartition(".")
        while path:
            around = self._unwrapped().root.get_submodule(outer)
            if isinstance(around, fx.GraphModule):
                # The body of an operation of the graph around it (a loop, a branch, a block without gradients) is a
                # constant of that graph, and was made from the same model. A module that it calls is a node.
                body = any(node.op == "get_attr" and node.target == name for node in around.graph.nodes)
                return self._base(outer) if body else path
            if not outer:
                break
            outer, _, part = outer.rpartition(".")
            name = f"{part}.{name}"
        return path


def _made(module: fx.GraphModule) -> dict[str, Made]:
    """What each node of a graph was made from, by the node's name; as it was when its code was first looked at."""
    code, found = module.code, _known.get(module)
    if found is None or found[0] != code:
        found = _known[module] = code, {node.name: _made_from(node) for node in module.graph.nodes}
    return found[1]


def _made_from(node: fx.Node) -> Made:
    stack: Any = node.meta.get("nn_module_stack")
    entries = list(stack.values()) if isinstance(stack, Mapping) else []
    # Innermost last. A path that cannot be read, and a class without a path, say nothing.
    for entry in reversed(entries):
        if not isinstance(entry, tuple) or len(entry) != 2:
            continue
        path = _plain(str(entry[0]))
        if path is not None:
            made = entry[1] if isinstance(entry[1], str) else entry[1].__qualname__
            return Made(path, made.rpartition(".")[2])
    return Made(node.name, "")


def _plain(path: str) -> str | None:
    """A path as the model has it, whichever of torch's own spellings it comes in; None: it is no path.

    ``L['self'].layers[0]`` and ``L__self__.layers.0`` are ``layers.0``; ``layers.0@1`` is its second call.
    """
    path = _INDEX.sub(r".\1", path).removeprefix("L.self").removeprefix("L__self__").partition("@")[0].strip(".")
    return path if _PATH.fullmatch(path) else None
