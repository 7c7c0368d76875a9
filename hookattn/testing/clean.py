"""``check_clean``: nothing of this library is left on a model or in torch."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import checks
from ..taps.active import current
from ..torch_internals import code_patching
from ..torch_internals.function_modes import open_modes
from ..torch_internals.module_state import global_hooks, hook_flags_of, hooks_of
from ..torch_internals.tensor_identity import version_of


def check_clean(model: nn.Module) -> None:
    """Check that no hook, patch or function mode of this library is left (no trace may be running elsewhere).

    Raises:
        AssertionError: something is.
        InputError: ``model`` is no module.
    """
    checks.one_of("model", model, nn.Module, "a torch.nn.Module")
    assert current() is None, "a trace is still running in this thread"
    assert not any(_ours(type(mode)) for mode in open_modes()), "a torch function mode is still open"
    assert not code_patching.exchanged(), f"still exchanged: {code_patching.exchanged()}"
    for name, hooks in global_hooks().items():
        assert not any(_ours(hook) for hook in hooks.values()), f"left in torch.nn.modules.module.{name}"
    for path, module in model.named_modules():
        assert not _ours(vars(module).get("forward")), f"{path or '<model>'}: forward is still replaced"
        kinds = hooks_of(module)
        for name, hooks in kinds.items():
            left = any(_ours(hook) for hook in hooks.values())
            assert not left, f"{path or '<model>'}: a hook is left in {name}"
        keys = {key for hooks in kinds.values() for key in hooks}
        for name, flags in hook_flags_of(module).items():
            assert set(flags) <= keys, f"{path or '<model>'}: {name} speaks of a hook that is gone"


def _ours(x: Any) -> bool:
    return str(getattr(x, "__module__", "")).split(".")[0] == __name__.split(".")[0]


def state_of(model: nn.Module) -> set[tuple[Any, ...]]:
    """What a trace could leave behind: attributes, hooks, mode, and whether a parameter was written to."""
    found: set[tuple[Any, ...]] = set()
    for path, module in model.named_modules():
        found.add((path, "attributes", *sorted(vars(module))))
        found.add((path, "training", module.training))
        found.update((path, name, len(hooks)) for name, hooks in hooks_of(module).items())
    found.update((name, id(p), p.requires_grad, version_of(p)) for name, p in model.named_parameters())
    return found
