"""All adapters, in one place: those registered by hand, and those of installed packages.

A package offers adapters through an entry point in the group ``hookattn.adapters`` that names an iterable of
:class:`hookattn.Adapter` instances. Entry points are read when the first trace asks for them, not on import.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points

from torch import nn

from .. import checks
from ..attention.axis_letters import problem_of
from ..calls.site import Site
from ..errors import BrokenAdapterError, DuplicateAdapterError, UnsupportedConfigError
from ..torch_internals.forks import lock_of_all
from .adapter import Adapter
from .moved import moved_to

GROUP = "hookattn.adapters"
_HERE = "register()"
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")

_lock = lock_of_all()
_adapters: dict[str, tuple[Adapter, str]] = {}
_by_module: dict[str, Adapter | None] = {}
_loaded = False
_generation = 0


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
            _changed()


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
        _changed()
        _loaded = True
    try:
        for adapter in only:
            register(adapter)
        yield
    finally:
        with _lock:
            _adapters.clear()
            _adapters.update(before)
            _changed()
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
            _by_module[where] = _claimed(module)
        return _by_module[where]


def _claimed(module: nn.Module) -> Adapter | None:
    """The one adapter that knows a class, which has to be one that it covers."""
    where = f"{type(module).__module__}.{type(module).__qualname__}"
    found: list[Adapter] = []
    for adapter, _ in _adapters.values():
        try:
            knows = adapter.knows(module)
        except Exception as error:
            raise _blame(adapter, where, "knows", error) from error
        if knows:
            found.append(adapter)
    for adapter in found:
        if not Adapter.knows(adapter, module):
            raise BrokenAdapterError(
                f"{owner(adapter)} claims {where}, which is in none of the modules that it covers "
                f"({', '.join(adapter.covers)}). Mend its `knows`, or name the module in `covers`."
            )
    return found[0] if found else None  # no two cover the same


def check(adapter: Adapter, path: str, module: nn.Module) -> None:
    """:meth:`Adapter.check`, with errors that say whose they are.

    Raises:
        UnsupportedConfigError: the adapter refuses; names it, its distribution and the path.
        BrokenAdapterError: it fails; likewise.
    """
    try:
        adapter.check(module)
    except UnsupportedConfigError as error:
        raise UnsupportedConfigError(f"{path or '<model>'}: {error} (said by {owner(adapter)})") from error
    except Exception as error:
        raise _blame(adapter, path, "check", error) from error


def site_of(adapter: Adapter, path: str, module: nn.Module, root: nn.Module) -> Site:
    """:meth:`Adapter.site`, checked.

    Raises:
        BrokenAdapterError: it fails, or returns something else than the site of this module; names the adapter, its
            distribution and the path.
    """
    try:
        site: object = adapter.site(path, module, root)
    except Exception as error:
        raise _blame(adapter, path, "site", error) from error
    wrong = ""
    if not isinstance(site, Site):
        wrong = f"returned {site!r}, which is no Site"
    elif site.path != path:
        wrong = f"returned a site at {site.path!r}"
    elif not all(isinstance(x, str) and x for x in (site.stack, site.kind, site.axes)):
        wrong = f"returned stack={site.stack!r}, kind={site.kind!r}, axes={site.axes!r}; each has to be a word"
    elif any(n is not None and (type(n) is not int or n < 0) for n in (site.layer, site.layers)):
        wrong = f"returned layer={site.layer!r} of {site.layers!r}; both have to be counts, or None"
    if wrong:
        raise BrokenAdapterError(f"{path or '<model>'}: `site` of {owner(adapter)} {wrong}.")
    assert isinstance(site, Site)
    return site


def _blame(adapter: Adapter, path: str, method: str, error: Exception) -> BrokenAdapterError:
    return BrokenAdapterError(
        f"{path or '<model>'}: `{method}` of {owner(adapter)} failed: {type(error).__name__}: {error}. "
        "Mend it, or trace without it."
    )


def owner(adapter: Adapter) -> str:
    source = next((s for a, s in _adapters.values() if a is adapter), _HERE)
    return f"the adapter {adapter.name!r} of {source if source == _HERE else f'distribution {source!r}'}"


def generation() -> int:
    """Counts the changes: what was found out with adapters of another generation may not hold any more."""
    if not _loaded:
        with _lock:
            _load()
    return _generation


def _changed() -> None:
    global _generation
    _by_module.clear()
    _generation += 1


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
        place = moved_to(error)
        raise BrokenAdapterError(
            f"{who} in the group {GROUP!r} cannot be loaded: {type(error).__name__}: {error}. "
            f"{place + ' ' if place else ''}Mend or uninstall {_distribution(point)!r}."
        ) from error
    if isinstance(found, Adapter) or not isinstance(found, Iterable):
        raise BrokenAdapterError(f"{who} has to name an iterable of Adapter instances; got {type(found).__name__}.")
    try:
        return tuple(found)
    except Exception as error:
        raise BrokenAdapterError(
            f"{who} in the group {GROUP!r} failed while it was read: {type(error).__name__}: {error}. "
            f"{moved_to(error)}".rstrip()
        ) from error


def _add(adapter: Adapter, source: str) -> None:
    who = source if source == _HERE else f"distribution {source!r}"
    if not isinstance(adapter, Adapter):
        hint = " (a class: register an instance)" if isinstance(adapter, type) else ""
        raise BrokenAdapterError(f"{who}: expected an Adapter instance, got {checks.printed(adapter)}{hint}.")
    if not adapter.name or not isinstance(adapter.name, str):
        raise BrokenAdapterError(f"{who}: the adapter {type(adapter).__name__} has no name.")
    if not adapter.covers or isinstance(adapter.covers, str):
        raise BrokenAdapterError(
            f"{who}: the adapter {adapter.name!r} has to name in `covers` a tuple of Python modules; "
            f"got {adapter.covers!r}."
        )
    bad = next((c for c in adapter.covers if not isinstance(c, str) or not _MODULE.fullmatch(c)), None)
    if bad is not None or "torch" in (c.partition(".")[0] for c in adapter.covers):
        raise BrokenAdapterError(
            f"{who}: the adapter {adapter.name!r} covers {bad if bad is not None else adapter.covers!r}; "
            "expected names of Python modules of its own, not all of them and none of torch."
        )
    if not isinstance(adapter.attention, Mapping) or not all(
        isinstance(x, str) and x for pair in adapter.attention.items() for x in pair
    ):
        raise BrokenAdapterError(
            f"{who}: `attention` of the adapter {adapter.name!r} has to map class names to kinds; "
            f"got {adapter.attention!r}."
        )
    if not isinstance(adapter.layout, Mapping) or not all(isinstance(x, str) for x in adapter.layout):
        raise BrokenAdapterError(
            f"{who}: `layout` of the adapter {adapter.name!r} has to map class names to the axes of q; "
            f"got {adapter.layout!r}."
        )
    for kind, letters in adapter.layout.items():
        if problem := problem_of(letters) or (None if kind in adapter.attention else f"{kind!r} is not in `attention`"):
            raise BrokenAdapterError(
                f"{who}: `layout` of the adapter {adapter.name!r} says {kind!r}: {letters!r}, and {problem}."
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
    _changed()


def _nested(a: str, b: str) -> bool:
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")
