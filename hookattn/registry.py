"""All adapters, in one place: those registered by hand, and those of installed packages.

A package offers adapters through an entry point in the group ``hookattn.adapters`` that names an iterable of
:class:`~hookattn.adapter.Adapter` instances. Entry points are read when the first trace asks for them, not on import.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points

from torch import nn

from .adapter import Adapter
from .errors import BrokenAdapterError, DuplicateAdapterError

GROUP = "hookattn.adapters"
_HERE = "register()"

_lock = threading.RLock()
_adapters: dict[str, tuple[Adapter, str]] = {}
_by_module: dict[str, Adapter | None] = {}
_loaded = False


def register(adapter: Adapter) -> Adapter:
    """Add an adapter for this process.

    Raises:
        BrokenAdapterError: it is not an instance of :class:`Adapter`, or has no name or covers nothing.
        DuplicateAdapterError: its name, or a Python module that it covers, is taken.
    """
    with _lock:
        _load()
        _add(adapter, _HERE)
    return adapter


def unregister(name: str) -> None:
    """Remove an adapter that was added with :func:`register` (for tests and notebooks)."""
    with _lock:
        if name in _adapters and _adapters[name][1] == _HERE:
            del _adapters[name]
            _by_module.clear()


@contextmanager
def using(*only: Adapter) -> Iterator[None]:
    """These adapters and no others, installed ones left out, until the block ends (for tests).

    Raises:
        BrokenAdapterError, DuplicateAdapterError: as :func:`register` does.
    """
    global _loaded
    with _lock:
        before, loaded = dict(_adapters), _loaded
        _adapters.clear()
        _by_module.clear()
        _loaded = True
    try:
        for adapter in only:
            register(adapter)
        yield
    finally:
        with _lock:
            _adapters.clear()
            _adapters.update(before)
            _by_module.clear()
            _loaded = loaded


def adapters() -> dict[str, tuple[Adapter, str]]:
    """Every adapter by name, with the distribution that brought it.

    Raises:
        BrokenAdapterError: a plug-in cannot be loaded; names its distribution.
        DuplicateAdapterError: two plug-ins claim one name or module.
    """
    with _lock:
        _load()
        return dict(sorted(_adapters.items()))


def adapter_for(module: nn.Module) -> Adapter | None:
    """The adapter that covers the class of a module."""
    where = type(module).__module__
    with _lock:
        _load()
        if where not in _by_module:
            _by_module[where] = next((a for a, _ in _adapters.values() if a.knows(module)), None)
        return _by_module[where]


def _load() -> None:
    global _loaded
    if _loaded:
        return
    before = dict(_adapters)
    try:
        for point in sorted(entry_points(group=GROUP), key=lambda p: (_distribution(p), p.name)):
            for adapter in _read(point):
                _add(adapter, _distribution(point))
    except BaseException:
        _adapters.clear()
        _adapters.update(before)
        raise
    _loaded = True


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"


def _read(point: EntryPoint) -> tuple[Adapter, ...]:
    who = f"distribution {_distribution(point)!r}, entry point {point.name!r} ({point.value})"
    try:
        found = point.load()
    except Exception as error:
        raise BrokenAdapterError(
            f"{who} in the group {GROUP!r} cannot be loaded: {type(error).__name__}: {error}. "
            f"Mend or uninstall {_distribution(point)!r}."
        ) from error
    if isinstance(found, Adapter) or not isinstance(found, Iterable):
        raise BrokenAdapterError(f"{who} has to name an iterable of Adapter instances; got {type(found).__name__}.")
    try:
        return tuple(found)
    except Exception as error:
        raise BrokenAdapterError(
            f"{who} in the group {GROUP!r} failed while it was read: {type(error).__name__}: {error}."
        ) from error


def _add(adapter: Adapter, source: str) -> None:
    who = source if source == _HERE else f"distribution {source!r}"
    if not isinstance(adapter, Adapter):
        hint = " (a class: register an instance)" if isinstance(adapter, type) else ""
        raise BrokenAdapterError(f"{who}: expected an Adapter instance, got {adapter!r}{hint}.")
    if not adapter.name or not isinstance(adapter.name, str):
        raise BrokenAdapterError(f"{who}: the adapter {type(adapter).__name__} has no name.")
    if not adapter.covers or isinstance(adapter.covers, str):
        raise BrokenAdapterError(
            f"{who}: the adapter {adapter.name!r} has to name in `covers` a tuple of Python modules; "
            f"got {adapter.covers!r}."
        )
    for other, theirs in _adapters.values():
        shared = [c for c in adapter.covers if any(_nested(c, o) for o in other.covers)]
        if other.name == adapter.name or shared:
            what = f"the name {adapter.name!r}" if other.name == adapter.name else f"the module {shared[0]!r}"
            raise DuplicateAdapterError(
                f"{who}: {what} is already claimed by the adapter {other.name!r} of "
                f"{theirs if theirs == _HERE else f'distribution {theirs!r}'}. "
                "Rename one, or uninstall one of the two."
            )
    _adapters[adapter.name] = (adapter, source)
    _by_module.clear()


def _nested(a: str, b: str) -> bool:
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")
