"""``check_clean``: nothing of this library is left on a model or in torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..taps.active import current
from ..torch_internals import code_patching

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def check_clean(model: nn.Module) -> None:
    """Check that no hook, patch or function mode of this library is left (no trace may be running elsewhere)."""
    assert current() is None, "a trace is still running in this thread"
    modes = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    assert not any(_ours(type(mode)) for mode in modes), "a torch function mode is still open"
    assert not code_patching.exchanged(), f"still exchanged: {code_patching.exchanged()}"
    for name in dir(nn.modules.module):
        if name.startswith("_global_") and name.endswith("hooks"):
            hooks = getattr(nn.modules.module, name)
            assert not any(_ours(hook) for hook in hooks.values()), f"left in torch.nn.modules.module.{name}"
    for path, module in model.named_modules():
        state = vars(module)
        assert not _ours(state.get("forward")), f"{path or '<model>'}: forward is still replaced"
        ids = {key for name in _HOOKS for key in state[name]}
        for name in _HOOKS:
            left = any(_ours(hook) for hook in state[name].values())
            assert not left, f"{path or '<model>'}: a hook is left in {name}"
        for name in _FLAGS:
            assert set(state[name]) <= ids, f"{path or '<model>'}: {name} speaks of a hook that is gone"


def _ours(x: Any) -> bool:
    return str(getattr(x, "__module__", "")).split(".")[0] == __name__.split(".")[0]


def state_of(model: nn.Module) -> set[tuple[Any, ...]]:
    """What a trace could leave behind: attributes, hooks, mode, and whether a parameter was written to."""
    found: set[tuple[Any, ...]] = set()
    for path, module in model.named_modules():
        state = vars(module)
        found.add((path, "attributes", *sorted(state)))
        found.add((path, "training", module.training))
        found.update((path, name, len(state[name])) for name in _HOOKS)
    found.update((name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters())
    return found
