"""Finds the attention sites of a model: those that adapters name, and whether the rest must be watched as a whole.

Looking at every module costs as much as a layer of a small model runs, so what was found is remembered for as long as
the model lives, and used again while it still has the same modules under the same names. What depends on a
configuration is asked again each time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..calls.site import Site
from ..errors import ModelError
from ..taps import covered
from ..torch_internals.module_state import buffers_of, children_of, parameters_of
from . import registry
from .adapter import Adapter
from .layer_numbers import sounds_like_attention
from .registry import adapter_for, generation

# What of torch.nn attends. Its encoder layers, and other people's after their example, leave their fused eval path as
# soon as a hook is attached anywhere in them; its decoder layers attend in their nn.MultiheadAttention alone.
_TORCH_ATTENDS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


@dataclass
class WatchPlan:
    """Which modules of a model are watched, and how.

    Attributes:
        sites: the sites that adapters named, by module identity.
        sealed: of those, the ones whose kernels are seen without the function mode.
        watch_all: whether some part of the model is covered by no adapter, so that the mode stays open throughout.
        modules: module identity -> module, of the sites.
        torch_modules: torch's own attention modules, where the mode is open in each of them rather than throughout.
        suspects: modules outside the sites that sound like attention.
        named: module identity -> the adapter that named it a site.
        classes: those of all modules; one that has several places in the model comes several times.
        sites_by_path: path -> site, as far as they were asked for; those of all traces of one model.
    """

    model: nn.Module
    sites: dict[int, Site] = field(default_factory=dict)
    sealed: set[int] = field(default_factory=set)
    watch_all: bool = False
    modules: dict[int, nn.Module] = field(default_factory=dict)
    torch_modules: list[nn.Module] = field(default_factory=list)
    suspects: list[tuple[str, nn.Module]] = field(default_factory=list)
    named: dict[int, Adapter] = field(default_factory=dict)
    classes: list[type] = field(default_factory=list)
    sites_by_path: dict[str, Site] = field(default_factory=dict)

    @property
    def adapters(self) -> set[str]:
        """The names of the adapters that had a say."""
        return {adapter.name for adapter in self.named.values()}

    @functools.cached_property
    def paths(self) -> dict[int, str]:
        """Module identity -> path, of every module."""
        return {id(module): path for path, module in self.model.named_modules()}


class _Shape(NamedTuple):
    """What modules there are: their names, identities and classes, the children of one module together."""

    generation: int
    names: list[str]
    modules: list[int]
    classes: list[type]


class _Found(NamedTuple):
    """What was found in a model of one shape; modules by their place in it, so that nothing keeps them alive."""

    shape: _Shape
    sites: list[tuple[int, Site, Adapter]]
    suspects: list[tuple[int, str]]
    torch_modules: list[int]
    watch_all: bool
    leaves: list[bool]
    sites_by_path: dict[str, Site]


_MANY = 10_000
_UNKNOWN = (False,) * _MANY
_known: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()


def make_watch_plan(model: nn.Module) -> WatchPlan:
    """Ask the adapters about every module of a model.

    Raises:
        ModelError: it is no module; or a part that attends is scripted, or has its weights on the meta device.
        UnsupportedConfigError: an adapter refuses the configuration.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model has to be a torch.nn.Module; got {type(model).__name__} {str(model)[:60]!r}.")
    known = _known.get(model)
    modules, shape = _walk(model, _UNKNOWN if known is None else known.leaves)
    if known is not None and known.shape == shape:
        found = known
        for place, site, adapter in found.sites:
            registry.check(adapter, site.path, modules[place])
    else:
        modules, shape = _walk(model, _UNKNOWN)
        found = _known[model] = _look(model, modules, shape)
    plan = WatchPlan(model, watch_all=found.watch_all, classes=shape.classes, sites_by_path=found.sites_by_path)
    for place, site, adapter in found.sites:
        module = modules[place]
        plan.sites[id(module)], plan.modules[id(module)] = site, module
        plan.named[id(module)] = adapter
    plan.sealed = covered(plan.modules.values())
    plan.torch_modules = [modules[place] for place in found.torch_modules]
    plan.suspects = [(path, modules[place]) for place, path in found.suspects]
    return plan


def _walk(model: nn.Module, leaves: Sequence[bool]) -> tuple[list[nn.Module], _Shape]:
    """Every module; one that has several places comes several times, unless there are too many of them (a circle).

    Those that ``leaves`` marks had no children when the model was last looked at, and are of torch: they are not asked.
    """
    modules: list[nn.Module] = [model]
    names: list[str] = []
    for module, leaf in zip(modules, leaves, strict=False):
        if not leaf and (children := children_of(module)):
            names.extend(children.keys())  # that of a scripted module is no dict and cannot be iterated over itself
            modules.extend([child for child in children.values() if child is not None])
    if len(modules) > _MANY:
        modules, names = list(model.modules()), [path for path, _ in model.named_modules()]
    return modules, _Shape(generation(), names, list(map(id, modules)), list(map(type, modules)))


def _look(model: nn.Module, modules: list[nn.Module], shape: _Shape) -> _Found:
    places = {key: place for place, key in enumerate(shape.modules)}
    _check_scripted(model)
    check_meta(model)
    sites: list[tuple[int, Site, Adapter]] = []
    suspects: list[tuple[str, nn.Module]] = []
    fixed: list[nn.Module] = []
    unnamed: list[tuple[str, nn.Module]] = []
    torch_modules: list[int] = []
    watch_all = False
    for path, module in model.named_modules():
        cls = type(module)
        if _never_attends(cls):
            continue
        adapter = adapter_for(module)
        if adapter is not None:
            if cls.__name__ in adapter.attention:
                registry.check(adapter, path, module)
                sites.append((places[id(module)], registry.site_of(adapter, path, module, model), adapter))
            elif sounds_like_attention(cls.__name__):
                unnamed.append((path, module))
            continue
        if isinstance(module, _TORCH_ATTENDS):
            fixed.append(module)
        if cls is nn.MultiheadAttention:
            torch_modules.append(places[id(module)])
        else:
            watch_all = True
        if sounds_like_attention(cls.__name__):
            suspects.append((path, module))
    for path, module in unnamed:  # neither around a site nor in one: a class that the adapter has not heard of
        if not any(within(path, site.path) or within(site.path, path) for _, site, _ in sites):
            watch_all = True
            suspects.append((path, module))
    locked = {id(m) for top in fixed for m in top.modules()}
    hookable = [(places[id(m)], path) for path, m in suspects if id(m) not in locked]
    leaves = [not children_of(m) and _never_attends(type(m)) for m in modules]
    return _Found(shape, sites, hookable, [] if watch_all else torch_modules, watch_all, leaves, {})


def check_meta(model: nn.Module) -> None:
    """Raise if some weights have no values.

    Raises:
        ModelError: naming the first that is on the meta device.
    """
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or "_hf_hook" in vars(module):  # that one brings its weights
            continue
        for name, x in (*parameters_of(module).items(), *buffers_of(module).items()):
            if x is not None and x.is_meta:
                raise ModelError(
                    f"{f'{path}.{name}' if path else name} is on the meta device and has no values; load the weights "
                    "(to_empty() and load_state_dict()) before tracing."
                )


def _check_scripted(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule) and type(model).__module__.startswith("torch.jit"):
        raise ModelError(
            f"{type(model).__name__} is scripted or traced by torch.jit, and nothing can be seen in compiled code; "
            "trace the Python module that it was made from."
        )


def _never_attends(cls: type[nn.Module]) -> bool:
    return cls.__module__.startswith("torch.nn.") and not issubclass(cls, _TORCH_ATTENDS)


def within(path: str, outer: str) -> bool:
    """Whether a module path lies in another, or is it."""
    return path == outer or path.startswith(outer + ".") or not outer
