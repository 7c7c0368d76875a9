"""What a module holds, as the dictionaries it is kept in: children, parameters, buffers, hooks.

``named_children``, ``named_parameters`` and ``named_buffers`` are public. They leave out places that are empty or hold
what another place holds already, which number layers and tell whether a model is still the same; and they are
generators over every module in it, ten times as slow. ``register_forward_pre_hook`` and ``register_forward_hook`` make
a handle for each hook, which for each of a model's many modules costs as much as the hook.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from .private import missing


def _attribute(name: str) -> Callable[[nn.Module], Any]:
    # attrgetter runs in C: discovery asks for the children of every module at the start of every trace.
    there = name in vars(nn.Module())
    return attrgetter(name) if there else missing(f"torch.nn.Module.{name}", "walks over modules")


children_of: Callable[[nn.Module], dict[str, nn.Module | None]] = _attribute("_modules")
"""The children of a module by name, places that are empty and those that share one included."""
parameters_of: Callable[[nn.Module], dict[str, nn.Parameter | None]] = _attribute("_parameters")
"""The parameters of a module itself by name, likewise."""
buffers_of: Callable[[nn.Module], dict[str, Tensor | None]] = _attribute("_buffers")
"""The buffers of a module itself by name, likewise."""
pre_hooks_of: Callable[[nn.Module], OrderedDict[Any, Any]] = _attribute("_forward_pre_hooks")
"""The hooks that run before a module's forward, by the keys of their handles; any other key will do."""
post_hooks_of: Callable[[nn.Module], dict[Any, Any]] = _attribute("_forward_hooks")
"""The hooks that run after it, likewise."""
always_called_of: Callable[[nn.Module], dict[Any, bool]] = _attribute("_forward_hooks_always_called")
"""Of those, the keys of the ones that are called where the forward raises, too."""

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def is_replica(module: nn.Module) -> bool:
    """Whether it is a copy for one device, as ``torch.nn.DataParallel`` makes it; its hooks are the original's."""
    return "_is_replica" in vars(module)


def alike(module: nn.Module, cls: type[nn.Module], children: dict[str, nn.Module | None]) -> nn.Module:
    """A module with the attributes of another, of a class and with children of its own; it is not made to run."""
    made: nn.Module = object.__new__(cls)
    vars(made).update({**vars(module), "_modules": children})
    return made


def hooks_of(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """The hooks of a module: kind -> those of this kind, by the keys of their handles."""
    return {name: vars(module)[name] for name in _HOOKS}


def hook_flags_of(module: nn.Module) -> dict[str, dict[Any, bool]]:
    """What is noted beside some hooks (called with keywords, called always), by the keys of their handles."""
    return {name: vars(module)[name] for name in _FLAGS}


def global_hooks() -> dict[str, dict[Any, Any]]:
    """The hooks that run in every module of the process: kind -> those of this kind."""
    home = nn.modules.module
    return {name: getattr(home, name) for name in dir(home) if name.startswith("_global_") and name.endswith("hooks")}
