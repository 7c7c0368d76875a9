"""Brackets around the modules of a model, for as long as a trace runs: where we are in it.

Modules that an adapter covers are bracketed at their attention sites alone. Everything else is watched as a whole: the
generic way, which needs to know nothing of a model, finds the site of a call by looking which module's forward is on
the stack. Every hook goes when the trace ends; a hook does nothing in another thread than the trace's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..calls.site import Site
from ..taps.active import current
from ..torch_internals.frames import call_arguments, running_path
from ..torch_internals.module_state import (
    always_called_of,
    children_of,
    global_hooks,
    is_replica,
    post_hooks_of,
    pre_hooks_of,
)
from .discovery import WatchPlan
from .graph_sites import UNKNOWN, GraphSites
from .site_names import site_of_path


class ModuleHooks:
    """The hooks of one running trace.

    Args:
        plan: what is watched.
        enter, leave: called around the forward of each site whose kernels don't say themselves where they run.
        model_begins, model_ends: called around that of the model.
        ran: gets, by identity, what ran of the sites and of the modules that sound like attention.
        in_replica: called where a copy of a module runs, in a thread of its own.
        active: whether a hook that is called is of the trace's own thread, and not in a backward pass.
    """

    def __init__(
        self,
        plan: WatchPlan,
        enter: Callable[[nn.Module], None],
        leave: Callable[[], None],
        model_begins: Callable[[], None],
        model_ends: Callable[[], None],
        ran: dict[int, nn.Module],
        in_replica: Callable[[], None],
        active: Callable[[], bool],
    ):
        self.plan = plan
        self._hooked: list[tuple[dict[Any, Any], Any]] = []
        self._global: Callable[..., None] | None = None  # the hook that is called before every module
        self._callbacks = (enter, leave, model_begins, model_ends, ran, in_replica, active)
        # A hook of its own would end the fused path of such a layer; one for all modules can't be told its end.
        self.tells_end = not isinstance(plan.model, nn.TransformerEncoderLayer)
        self._graphs = GraphSites(lambda: plan.unwrapped) if plan.has_graphs else None

    def install(self) -> None:
        """Attach every hook; those of sites whose kernels say themselves where they run only tell that they run."""
        enter, leave, model_begins, model_ends, ran, in_replica, active = self._callbacks
        plan, model = self.plan, self.plan.model
        # Plain data, and no handle's number: a model may be copied while it runs, with its hooks.
        key = "hookattn", id(self)
        ran_key = *key, "ran"

        def begins(module: nn.Module, _: Any) -> None:
            if module is model and active():
                model_begins()
            elif is_replica(module):
                in_replica()

        def ends(module: nn.Module, *_: Any) -> None:
            if module is model and active():
                model_ends()

        def runs(module: nn.Module, _: Any) -> None:
            if active():
                ran[id(module)] = module
                # That it runs is told once: a module with a hook takes a longer way to its forward (3 % of a toy).
                pre_hooks_of(module).pop(ran_key, None)
            elif is_replica(module):
                in_replica()

        def enters(module: nn.Module, _: Any) -> None:
            if active():
                enter(module)
            elif is_replica(module):
                in_replica()

        def leaves(*_: Any) -> None:
            if active():
                leave()

        if self.tells_end:
            self._before(model, key, begins)
            pre_hooks_of(model).move_to_end(key, last=False)
            self._after(model, key, ends)
        else:
            self._global = begins
            register_module_forward_pre_hook(begins)
        for _, module in plan.suspects:
            self._before(module, ran_key, runs)
        for module in (*plan.modules.values(), *plan.torch_modules):
            if id(module) in plan.sealed:
                self._before(module, ran_key, runs)
            else:
                self._before(module, (*key, "site"), enters)
                self._after(module, (*key, "site"), leaves)

    def _before(self, module: nn.Module, key: Any, hook: Callable[..., None]) -> None:
        """What ``register_forward_pre_hook`` does, without a handle for each of a model's many modules."""
        hooks = pre_hooks_of(module)
        self._hooked.append((hooks, key))  # first: if this is broken off, it tells what is to be removed
        hooks[key] = hook

    def _after(self, module: nn.Module, key: Any, hook: Callable[..., None]) -> None:
        """What ``register_forward_hook(hook, always_call=True)`` does, likewise."""
        hooks, always = post_hooks_of(module), always_called_of(module)
        self._hooked += ((hooks, key), (always, key))
        hooks[key], always[key] = hook, True

    def remove(self) -> None:
        """Detach every hook. It can be broken off and called again."""
        for hooks, key in self._hooked:
            hooks.pop(key, None)
        self._hooked.clear()
        if self._global is not None:
            # By identity: the handle may have been lost on its way here.
            for hooks in global_hooks().values():
                for key in [key for key, hook in hooks.items() if hook is self._global]:
                    hooks.pop(key, None)
            self._global = None

    def running(self) -> str | None:
        """The path of the innermost module of the model whose forward is on this thread's stack; None: none of them."""
        path = running_path(self.plan.paths)
        if path is None or self._graphs is None:
            return path
        path, known = self._graphs.running(path)
        if not known and (tracing := current()) is not None:
            tracing.note(UNKNOWN)
        return path

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Arguments of the forward of the model that is on this thread's stack; None: nobody called it."""
        return call_arguments(self.plan.model)

    def site(self, path: str) -> Site:
        """The site that a module belongs to, or a place in it, by the word of an adapter or else of its path."""
        found = self.plan.sites_by_path.get(path)
        if found is None:
            made_from = None if self._graphs is None else self._graphs.classes.get(path)
            found = self._site_around(path) or site_of_path(path, self.plan.unwrapped.root, made_from)
            self.plan.sites_by_path[path] = found
        return found

    def _site_around(self, path: str) -> Site | None:
        """The innermost site of an adapter that a path leads through."""
        unwrapped = self.plan.unwrapped
        module: nn.Module | None = unwrapped.root
        found = None
        for part in ("", *path.split(".")):
            if module is not None and part:
                module = children_of(module).get(part)
            if module is not None:
                found = self.plan.sites.get(id(unwrapped.real(module)), found)
        return found
