"""What the header of a trace says of a model."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_names: WeakKeyDictionary[type, tuple[int, list[str]]] = WeakKeyDictionary()


class Description(Mapping[str, Any]):
    """A mapping that is made when somebody reads it: turning a configuration into plain data costs as much as a layer.

    Args:
        make: makes it, of what was noted when the model ran.
    """

    def __init__(self, make: Callable[[], dict[str, Any]]):
        self._make: Callable[[], dict[str, Any]] | None = make
        self._made: dict[str, Any] = {}

    def _read(self) -> dict[str, Any]:
        if self._make is not None:
            self._made, self._make = self._make(), None
        return self._made

    def __getitem__(self, key: str) -> Any:
        return self._read()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return repr(self._read())

    def __eq__(self, other: object) -> bool:
        return self._read() == other if isinstance(other, dict) else super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._read(),)


def describe_model(model: nn.Module, cls: type[nn.Module], wrapped_by: Sequence[str]) -> Description:
    """Class, configuration and versions of a model and of the libraries that run it, as they are now.

    Args:
        model: without what is around it.
        cls: its own class, where its class was exchanged.
        wrapped_by: the names of the classes of wrappers in it; they are told where there are any.
    """
    config = _noted(model.config if hasattr(model, "config") else getattr(model, "cfg", None))

    def make() -> dict[str, Any]:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        # The library of the configuration as well: that of a model may be one that puts adapters into other models.
        for kind in (cls, type(config)):
            package = kind.__module__.partition(".")[0]
            version = getattr(sys.modules.get(package), "__version__", None)
            if isinstance(version, str):
                versions[package] = version
        said = {"class": cls.__name__, "module": cls.__module__, "config": _plain(config), "versions": versions}
        return {**said, "wrapped_by": list(wrapped_by)} if wrapped_by else said

    return Description(make)


def _noted(config: Any) -> Any:
    """A copy that later changes of the configuration, or of those within it, don't reach."""
    if isinstance(config, dict):
        return dict(config)
    try:  # past what a configuration does when an attribute is asked for, which takes its time
        values: dict[str, Any] = object.__getattribute__(config, "__dict__")
    except AttributeError:
        return config
    if not hasattr(type(config), "to_dict"):
        return dict(values)
    copy = object.__new__(type(config))
    own = values.copy()
    object.__setattr__(copy, "__dict__", own)
    for name in _nested(type(config), len(values), values):
        own[name] = _noted(values[name])
    return copy


def _nested(kind: type, count: int, values: dict[str, Any]) -> list[str]:
    """The names of the configurations within one; looked for once for each class and number of attributes."""
    known = _names.get(kind)
    if known is None or known[0] != count:
        found = [name for name, value in values.items() if hasattr(type(value), "to_dict")]
        known = _names[kind] = (count, found)
    return [name for name in known[1] if hasattr(type(values.get(name)), "to_dict")]


def _plain(config: Any) -> Any:
    if hasattr(config, "to_dict"):
        return config.to_dict()
    return config if config is None or isinstance(config, dict) else repr(config)
