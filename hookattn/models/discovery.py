"""Finds the attention sites of a model: those that adapters name, and whether the rest must be watched as a whole.

Looking at every module costs as much as a layer of a small model runs, so what was found is remembered for as long as
the model lives, and used again while it still has the same modules under the same names. What depends on a
configuration is asked again each time.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import fx, nn

from .. import checks
from ..cached import cached_property
from ..calls.site import Site
from ..errors import ModelError
from ..taps import covered
from ..torch_internals.module_state import buffers_of, children_of, parameters_of
from . import registry
from .adapter import Adapter
from .layer_numbers import sounds_like_attention
from .registry import adapter_for, generation
from .wrappers import Unwrapped, inside_all

# What of torch.nn attends. Its encoder layers, and other people's after their example, leave their fused eval path as
# soon as a hook is attached anywhere in them; its decoder layers attend in their nn.MultiheadAttention alone.
_TORCH_ATTENDS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


class WatchPlan:
    """Which modules of a model are watched, and how.

    Args:
        model: the model.
        found: what was found in it, whose attributes it has where they are not of modules.

    Attributes:
        sites: the sites that adapters named, by module identity.
        sealed: of those, the ones whose kernels are seen without the function mode.
        watch_all: whether some part of the model is covered by no adapter, so that the mode stays open throughout.
        modules: module identity -> module, of the sites.
        torch_modules: torch's own attention modules, where the mode is open in each of them rather than throughout.
        suspects: modules outside the sites that sound like attention.
        named: module identity -> the adapter that named it a site.
        classes: those of all modules; one that has several places in the model comes several times.
        model_class: of the model without its wrappers.
        wrapped_by: the names of the classes of wrappers in the model.
        has_graphs: whether graphs are among the modules, which torch.fx has written.
        sites_by_path: path -> site, as far as they were asked for; those of all traces of one model.
    """

    def __init__(self, model: nn.Module, found: _Found):
        self.model, self._found = model, found
        self.watch_all, self.has_graphs = found.watch_all, found.has_graphs
        self.classes, self.sites_by_path = found.classes, found.sites_by_path
        self.model_class, self.wrapped_by = found.model_class, found.wrapped_by
        self.sites: dict[int, Site] = {}
        self.modules: dict[int, nn.Module] = {}
        self.named: dict[int, Adapter] = {}
        for known, site, adapter in found.sites:
            module = _there(known)
            key = id(module)
            self.sites[key], self.modules[key], self.named[key] = site, module, adapter
        self.sealed = covered(self.modules.values())
        self.torch_modules = list(map(_there, found.torch_modules))
        self.suspects = [(path, _there(known)) for path, known in found.suspects]

    @property
    def inner(self) -> nn.Module:
        """The model inside all wrappers around it."""
        return inside_all(self.model)

    @property
    def adapters(self) -> set[str]:
        """The names of the adapters that had a say."""
        return {adapter.name for adapter in self.named.values()}

    @cached_property
    def paths(self) -> dict[int, str]:
        """Module identity -> path, of every module."""
        # What is asked for may be asked for late, when the block has changed the model.
        if not self._found.shape.holds(self.model):
            return self.unwrapped.paths()
        known = self._found.paths
        if not known:  # 1 % of a toy that no adapter covers
            known.update(self.unwrapped.paths())
        return known

    @cached_property
    def unwrapped(self) -> Unwrapped:
        """The model without wrappers, which paths count from."""
        return Unwrapped(self.model)

    @cached_property
    def site_paths(self) -> frozenset[str]:
        """The paths of the sites."""
        return frozenset([site.path for site in self.sites.values()])


class _Shape:
    """What modules a model had when it was looked at, none of which it keeps alive.

    That it still has these is asked at the start of every trace, by functions that run in C over lists: it takes 2 % of
    a toy, and a walk through the model took more.

    Args:
        model: the model.
        modules: all its modules, each once, the model first.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]):
        self.generation = generation()
        # Those of torch that have no children will get none.
        inner = [m for m in modules if m is model or children_of(m) or not _never_attends(type(m))]
        self.inner = list(map(ref, inner))
        self.kind, self.names, self.children, self.kinds, self.counts = type(model), *_family(inner)

    def holds(self, model: nn.Module) -> bool:
        """Whether a model has the same modules under the same names, of the same classes."""
        inner = [found() for found in self.inner]
        if inner[0] is not model or type(model) is not self.kind or generation() != self.generation:
            return False
        # Each of them is a child of one before it, which is looked at: all that are left are in their old place.
        return None not in inner and _family(inner) == (self.names, self.children, self.kinds, self.counts)  # type: ignore[arg-type]


def _family(modules: list[nn.Module]) -> tuple[list[str], list[int], list[type], list[int]]:
    """The children of some modules: their names, identities and classes, and how many each module has."""
    dicts = list(map(children_of, modules))
    some = [x for x in dicts if x]
    # That of a scripted module is no dict, and cannot be iterated over itself.
    children = list(chain.from_iterable([x.values() for x in some]))
    names = list(chain.from_iterable([x.keys() for x in some]))
    return names, list(map(id, children)), list(map(type, children)), list(map(len, dicts))


class _Found(NamedTuple):
    """What was found in a model of one shape; nothing in it keeps a module alive. Attributes are a plan's."""

    shape: _Shape
    sites: list[tuple[ref[nn.Module], Site, Adapter]]
    suspects: list[tuple[str, ref[nn.Module]]]
    torch_modules: list[ref[nn.Module]]
    watch_all: bool
    classes: list[type]
    model_class: type[nn.Module]
    wrapped_by: list[str]
    has_graphs: bool
    sites_by_path: dict[str, Site]
    paths: dict[int, str]


_MANY = 10_000
_known: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()


def make_watch_plan(model: nn.Module) -> WatchPlan:
    """Ask the adapters about every module of a model.

    Raises:
        ModelError: it is no module; or a part that attends is scripted, or has its weights on the meta device.
        UnsupportedConfigError: an adapter refuses the configuration.
    """
    if not isinstance(model, nn.Module):
        got = f"{type(model).__name__} {checks.printed(model)}"
        raise ModelError(f"the model has to be a torch.nn.Module; got {got}.")
    found = _known.get(model)
    if found is not None and found.shape.holds(model):
        for there, site, adapter in found.sites:
            registry.check(adapter, site.path, _there(there))
    else:
        found = _known[model] = _look(model)
    return WatchPlan(model, found)


def _there(known: ref[nn.Module]) -> nn.Module:
    module = known()
    assert module is not None, "a model that has its old shape has its old modules"
    return module


def _classes(model: nn.Module) -> list[type]:
    """Those of all modules; one that has several places comes several times, unless there are too many (a circle)."""
    modules: list[nn.Module] = [model]
    for module in modules:
        modules.extend([child for child in children_of(module).values() if child is not None])
        if len(modules) > _MANY:
            return list(map(type, model.modules()))
    return list(map(type, modules))


def _look(model: nn.Module) -> _Found:
    _check_scripted(model)
    check_meta(model)
    sites: list[tuple[ref[nn.Module], Site, Adapter]] = []
    suspects: list[tuple[str, nn.Module]] = []
    fixed: list[nn.Module] = []
    unnamed: list[tuple[str, nn.Module]] = []
    torch_modules: list[ref[nn.Module]] = []
    watch_all = False
    unwrapped = Unwrapped(model)
    root = unwrapped.root
    # What stands in a place is looked at, and what it stands for is watched.
    for path, module, real in unwrapped.modules():
        cls = type(module)
        if _never_attends(cls):
            continue
        adapter = adapter_for(module)
        if adapter is not None:
            if cls.__name__ in adapter.attention:
                registry.check(adapter, path, module)
                sites.append((ref(real), registry.site_of(adapter, path, module, root), adapter))
            elif sounds_like_attention(cls.__name__):
                unnamed.append((path, real))
            continue
        if isinstance(module, _TORCH_ATTENDS):
            fixed.append(real)
        if cls is nn.MultiheadAttention:
            torch_modules.append(ref(real))
        else:
            watch_all = True
        if sounds_like_attention(cls.__name__):
            suspects.append((path, real))
    for path, module in unnamed:  # neither around a site nor in one: a class that the adapter has not heard of
        if not any(within(path, site.path) or within(site.path, path) for _, site, _ in sites):
            watch_all = True
            suspects.append((path, module))
    locked = {id(m) for top in fixed for m in top.modules()}
    hookable = [(path, ref(m)) for path, m in suspects if id(m) not in locked]
    classes = _classes(root)
    graphs = any(issubclass(cls, fx.GraphModule) for cls in classes)
    return _Found(
        _Shape(model, list(model.modules())),
        sites,
        hookable,
        [] if watch_all else torch_modules,
        watch_all,
        classes,
        type(root),
        unwrapped.wrapped_by,
        graphs,
        {},
        {},
    )


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
