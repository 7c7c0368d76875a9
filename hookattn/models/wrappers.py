"""A model as it is without what was put around it: what its paths, its classes and its configuration are told by.

What trains, shards, compiles or checkpoints a model puts a module around it or around its parts, which hands on what it
is given (``DistributedDataParallel``, ``torch.compile``, an engine), or exchanges the class of a module while it lives
(``fully_shard``). Neither is the model's own: the same attention has the same path and class with them and without.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import nn

from ..calls.site import WRAPPED
from ..torch_internals.module_state import alike, children_of, parameters_of

_hands_on: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def inner_of(module: nn.Module, outermost: bool) -> nn.Module | None:
    """The module that a wrapper is around; None: it is no wrapper.

    A wrapper has one child, in a place of one of the names that wrappers give it, and is of torch itself; or it is
    around a whole model, hands on whatever arguments it is given, and has no parameters (an engine).

    Args:
        module: which is looked at.
        outermost: whether it is the traced model, or around it only such wrappers are.
    """
    children = children_of(module)
    if len(children) != 1:
        return None
    ((name, inner),) = children.items()
    if name not in WRAPPED or inner is None:
        return None
    if name.startswith("_") or _is_of_torch(own_class(module)):
        return inner
    engine = (
        outermost and _hands_on_all(type(module)) and not any(x is not None for x in parameters_of(module).values())
    )
    return inner if engine else None


def inside_all(model: nn.Module) -> nn.Module:
    """A model without the wrappers around it; those inside it stay."""
    while (inner := inner_of(model, True)) is not None:
        model = inner
    return model


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before torch exchanged it for one of its own making."""
    return _exchanged(type(module))[0]


def is_sharded_by_torch(module: nn.Module) -> bool:
    """Whether ``fully_shard`` puts the weights of a module, and of those in it, together when they run."""
    return any("fsdp" in base.__module__ for base in type(module).__mro__ if not issubclass(base, nn.Module))


def _exchanged(cls: type[nn.Module]) -> tuple[type[nn.Module], list[str]]:
    """The class that another was made from as its module lived, and what was put before it in each exchange."""
    added: list[str] = []
    # The module of a made class says nothing: of one with a metaclass it is that of the metaclass.
    while len(cls.__bases__) == 2:
        mixed, own = cls.__bases__
        by_torch = mixed.__module__.startswith("torch.distributed.") and cls.__name__.endswith(own.__name__)
        if not by_torch or issubclass(mixed, nn.Module) or not issubclass(own, nn.Module):
            break
        added.append(mixed.__name__)
        cls = own
    return cls, added


def _is_of_torch(cls: type) -> bool:
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    return any(base.__module__.partition(".")[0] == "torch" for base in bases)


def _hands_on_all(cls: type[nn.Module]) -> bool:
    """Whether a forward takes any arguments, and knows none by name."""
    known = _hands_on.get(cls)
    if known is None:
        try:
            kinds = [p.kind for p in inspect.signature(cls.forward).parameters.values()][1:]
        except (TypeError, ValueError):
            kinds = []
        known = _hands_on[cls] = kinds == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]
    return known


class Unwrapped:
    """A model without wrappers, as far as one can look at it: it is not made to run.

    A module with a wrapper, or a module of an exchanged class, somewhere in it is stood for by one that has its own
    class, its attributes and its parameters, and the unwrapped children. All others stand for themselves.

    Args:
        model: the model, wrapped or not.

    Attributes:
        root: the model without wrappers; the model itself where it has none.
        wrapped_by: the names of the classes of what was left out, outermost first, each once.
    """

    def __init__(self, model: nn.Module):
        self._real: dict[int, nn.Module] = {}  # by identity of what stands for a module
        self._made: dict[int, nn.Module] = {}  # by identity of the module
        self._wrappers: list[tuple[nn.Module, nn.Module]] = []
        self.wrapped_by: list[str] = []
        own = self._inside(model, True)
        self._changed = self._around_a_change(own)
        self.root = self._standing_for(own)

    def real(self, module: nn.Module) -> nn.Module:
        """The module of the model that one of :attr:`root` stands for."""
        return self._real.get(id(module), module)

    def modules(self) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        """Path, what stands there and the module of the model that it stands for, of each module, each once."""
        for path, module in self.root.named_modules():
            yield path, module, self.real(module)

    def paths(self) -> dict[int, str]:
        """Identity -> path of every module of the model; a wrapper is where what it is around is."""
        found = {id(module): path for path, _, module in self.modules()}
        for wrapper, inner in self.wrappers():
            found[id(wrapper)] = found[id(inner)]
        return found

    def stand_ins(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Each module that was made to stand for one of the model, and that one."""
        for made in self._made.values():
            yield made, self._real[id(made)]

    def wrappers(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Each wrapper and what it is around, innermost first."""
        yield from reversed(self._wrappers)

    def _inside(self, module: nn.Module, outermost: bool) -> nn.Module:
        """What is inside all wrappers around one another."""
        while (inner := inner_of(module, outermost)) is not None:
            self._wrappers.append((module, inner))
            own, added = _exchanged(type(module))
            self._note(*added, own.__name__)
            module = inner
        return module

    def _note(self, *names: str) -> None:
        self.wrapped_by += [name for name in names if name not in self.wrapped_by]

    def _around_a_change(self, root: nn.Module) -> set[int]:
        """The identities of the modules in which, or of which, something is not as in the unwrapped model."""
        above: dict[int, list[nn.Module]] = {}
        changed: list[nn.Module] = []
        waiting = [root]
        for module in waiting:
            own, added = _exchanged(type(module))
            self._note(*added)
            if own is not type(module):
                changed.append(module)
            for child in children_of(module).values():
                if child is None:
                    continue
                inner = self._inside(child, False)
                if inner is not child:
                    changed.append(module)
                if id(inner) not in above:
                    waiting.append(inner)
                above.setdefault(id(inner), []).append(module)
        found: set[int] = set()
        while changed:
            module = changed.pop()
            if id(module) not in found:
                found.add(id(module))
                changed += above.get(id(module), [])
        return found

    def _standing_for(self, module: nn.Module) -> nn.Module:
        if id(module) not in self._changed:
            return module
        made = self._made.get(id(module))
        if made is None:
            children: dict[str, nn.Module | None] = {}
            made = self._made[id(module)] = alike(module, own_class(module), children)
            self._real[id(made)] = module
            for name, child in children_of(module).items():
                children[name] = None if child is None else self._standing_for(self._inside(child, False))
        return made
