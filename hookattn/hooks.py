"""Brackets around the modules of a model, for as long as a trace runs: which sites there are, and where we are.

Modules that an adapter covers are bracketed at their attention sites alone. Everything else is watched as a whole: the
generic way, which needs to know nothing of a model, finds the site of a call by looking which module's forward is on
the stack. Every hook goes when the trace ends; a hook does nothing in another thread than the trace's own.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .errors import ModelError
from .registry import adapter_for
from .site import Site, describe
from .taps import covered

_CALL_CODE = nn.Module._call_impl.__code__
# Modules that leave their fused eval path as soon as a hook is attached anywhere in them.
_NO_HOOKS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
# What of torch.nn itself attends; its other modules never do, and are not worth asking about.
_TORCH_ATTENDS = (*_NO_HOOKS, nn.Transformer, nn.TransformerDecoder, nn.TransformerDecoderLayer)
_ATTENDS = re.compile(r"aten::(_?softmax|scaled_dot_product|_native_multi_head|_transformer_encoder)")
_SOUNDS_LIKE = re.compile(r"(?i:attention|attn|mamba|retention|rwkv|delta_?net|hyena|linear_?att|deformable)|SSM|Ssm")
# What is named after attention and does none of it: SelfAttentionOutput, AttnAdapterLayer, RelativeAttentionBias, …
_ONLY_A_PART = re.compile(r"(?:Output|Projection|Bias|Mask|Norm|MLP|Dropout|Loss|Adapter(?:Layer)?)$")


@dataclass
class Plan:
    """What of a model has to be watched how.

    Attributes:
        sites: the sites that adapters named, by module identity.
        sealed: of those, the ones whose kernels are seen without the function mode.
        watch_all: whether some part of the model is covered by no adapter, so that the mode stays open throughout.
        paths: module identity -> path, of every module.
        suspects: modules outside the sites that sound like attention.
        adapters: the names of the adapters that had a say.
    """

    model: nn.Module
    sites: dict[int, Site] = field(default_factory=dict)
    sealed: set[int] = field(default_factory=set)
    watch_all: bool = False
    paths: dict[int, str] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)
    suspects: list[tuple[str, nn.Module]] = field(default_factory=list)
    adapters: set[str] = field(default_factory=set)


def make_plan(model: nn.Module) -> Plan:
    """Ask the adapters about every module of a model.

    Raises:
        ModelError: it is no module; or a part that attends is scripted, or has its weights on the meta device.
        UnsupportedConfigError: an adapter refuses the configuration.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model has to be a torch.nn.Module; got {type(model).__name__} {str(model)[:60]!r}.")
    plan = Plan(model)
    fixed: list[nn.Module] = []
    unnamed: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        cls = type(module)
        name = cls.__name__
        plan.paths[id(module)], plan.modules[id(module)] = path, module
        _check(path, module)
        if _never_attends(cls):  # type: ignore[arg-type]
            continue
        adapter = adapter_for(module)
        if adapter is not None:
            if name in adapter.attention:
                adapter.check(module)
                plan.sites[id(module)] = adapter.site(path, module, model)
                plan.adapters.add(adapter.name)
                if covered(module):
                    plan.sealed.add(id(module))
            elif _sounds_like_attention(name):
                unnamed.append((path, module))
            continue
        if isinstance(module, _NO_HOOKS):
            fixed.append(module)
        plan.watch_all = True
        if _sounds_like_attention(name):
            plan.suspects.append((path, module))
    named = [site.path for site in plan.sites.values()]
    for path, module in unnamed:  # neither around a site nor in one: a class that the adapter has not heard of
        if not any(_within(path, site) or _within(site, path) for site in named):
            plan.watch_all = True
            plan.suspects.append((path, module))
    locked = {id(m) for top in fixed for m in top.modules()}
    plan.suspects = [(p, m) for p, m in plan.suspects if id(m) not in locked]
    return plan


def _check(path: str, module: nn.Module) -> None:
    if type(module).__module__.startswith("torch.jit") and isinstance(module, torch.jit.ScriptModule):
        if not path or _ATTENDS.search(str(module.inlined_graph)):
            raise ModelError(
                f"{path or type(module).__name__} is scripted or traced by torch.jit, and nothing can be seen in "
                "compiled code; trace the Python module that it was made from."
            )
        return
    for name, x in (*module._parameters.items(), *module._buffers.items()):
        if x is not None and x.is_meta and "_hf_hook" not in vars(module):  # that one brings its weights when needed
            raise ModelError(
                f"{f'{path}.{name}' if path else name} is on the meta device and has no values; load the weights "
                "(to_empty() and load_state_dict()) before tracing."
            )


@functools.cache
def _never_attends(cls: type[nn.Module]) -> bool:
    return cls.__module__.startswith("torch.nn.") and not issubclass(cls, _TORCH_ATTENDS)


@functools.cache
def _sounds_like_attention(name: str) -> bool:
    return _SOUNDS_LIKE.search(name) is not None and _ONLY_A_PART.search(name) is None


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(outer + ".") or not outer


class Brackets:
    """The hooks of one running trace."""

    def __init__(
        self,
        plan: Plan,
        enter: Callable[[Site, bool], None],
        leave: Callable[[], None],
        root: Callable[[], None],
        ran: Callable[[str, nn.Module], None],
        active: Callable[[], bool],
    ):
        self.plan = plan
        self.handles: list[RemovableHandle] = []
        self._callbacks = (enter, leave, root, ran, active)

    def install(self) -> None:
        """Attach every hook."""
        enter, leave, root, ran, active = self._callbacks
        plan = self.plan
        if not isinstance(plan.model, _NO_HOOKS):
            first = plan.model.register_forward_pre_hook(lambda *_: root() if active() else None, prepend=True)
            self.handles.append(first)
        for path, module in plan.suspects:
            self._before(module, functools.partial(ran, path, module))
        for key, site in plan.sites.items():
            module, sealed = plan.modules[key], key in plan.sealed
            self._before(module, functools.partial(enter, site, sealed))
            last = module.register_forward_hook(lambda *_: leave() if active() else None, always_call=True)
            self.handles.append(last)

    def _before(self, module: nn.Module, action: Callable[[], None]) -> None:
        active = self._callbacks[-1]
        self.handles.append(module.register_forward_pre_hook(lambda *_: action() if active() else None))

    def remove(self) -> None:
        """Detach every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def running(self) -> str:
        """The path of the innermost module of the model whose forward is on this thread's stack; else empty."""
        frame: FrameType | None = sys._getframe(1)
        paths = self.plan.paths
        while frame is not None:
            if frame.f_code is _CALL_CODE:
                path = paths.get(id(frame.f_locals.get("self")))
                if path is not None:
                    return path
            frame = frame.f_back
        return ""

    def site(self, path: str) -> Site:
        """The site of a module that no adapter speaks for."""
        module: Any = self.plan.model.get_submodule(path)
        known = self.plan.sites.get(id(module))
        return known if known is not None else describe(path, module, self.plan.model)
