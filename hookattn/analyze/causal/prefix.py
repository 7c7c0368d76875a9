"""What a model has done before its first edited attention is run once, and later runs are given what it returned.

Nothing that has ended before an attention begins can depend on what is done to that attention. So modules that have
ended by then (the layers before it) need not run again: their ``forward`` is exchanged, as long as a run lasts, for one
that returns copies of what they returned. Which modules these are is seen in one run, and no structure is assumed.

This holds for modules whose results follow from their arguments. One that ran more than once, or returns something
else than tensors in plain containers, is left to run; and whoever uses this compares one run with the whole forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...torch_internals.isolation import isolated
from ...torch_internals.lazy_copies import snapshots
from ...torch_internals.undo import Change

_NONE = object()


class UnknownContent(TypeError):
    """Something that is neither a tensor nor a plain value, nor a container of such."""


def with_tensors(x: Any, of: Callable[[Tensor], Any]) -> Any:
    """The same containers with other tensors in them.

    Raises:
        UnknownContent: there is something else in it.
    """
    if isinstance(x, Tensor):
        return of(x)
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, (tuple, list)):
        several = [with_tensors(value, of) for value in x]
        return type(x)(*several) if hasattr(x, "_fields") else type(x)(several)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):  # a ModelOutput, say
        values = {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.init}
        return type(x)(**{name: with_tensors(value, of) for name, value in values.items()})
    if isinstance(x, Mapping):
        made = {key: with_tensors(value, of) for key, value in x.items()}
        return made if type(x) is dict else type(x)(**made)
    raise UnknownContent(type(x).__name__)


def tensors_in(x: Any) -> list[Tensor]:
    """The tensors in some containers, in their order; likewise."""
    found: list[Tensor] = []
    with_tensors(x, found.append)
    return found


@dataclasses.dataclass
class _Run:
    """One run of a module.

    Attributes:
        begun, ended: when it did, in beginnings and ends of modules; -1: never.
        shapes: of the tensors that it returned; None: it returned something that cannot be given again.
        output: what it returned, if it is kept.
    """

    begun: int
    ended: int = -1
    shapes: list[tuple[int, ...]] | None = None
    output: Any = None

    def inside(self, other: _Run) -> bool:
        return other.begun < self.begun and self.ended < other.ended


class Exchanged(Change):
    """Modules with another ``forward`` while a block runs.

    Args:
        forwards: each module with what it is run by.
    """

    __slots__ = ("_before", "_forwards")

    def __init__(self, forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]):
        self._forwards = list(forwards)
        self._before = [(module, vars(module).get("forward", _NONE)) for module, _ in self._forwards]

    def make(self) -> Any:
        """See the class."""
        for module, forward in self._forwards:
            vars(module)["forward"] = forward

    def undo(self) -> None:
        """See the class."""
        for module, before in self._before:
            if before is _NONE:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = before


class Watched(Exchanged):
    """Sees, while a block runs, when modules begin and end, and what they return.

    Args:
        modules: by path.
        keeps: whether what they return is kept, and not its shapes alone.
    """

    __slots__ = ("_clock", "_keeps", "runs")

    def __init__(self, modules: Mapping[str, nn.Module], keeps: bool):
        self.runs: dict[str, list[_Run]] = {}
        self._clock, self._keeps = 0, keeps
        super().__init__((module, self._around(path, module.forward)) for path, module in modules.items())

    def _around(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._clock += 1
            run = _Run(self._clock)
            self.runs.setdefault(path, []).append(run)
            out = forward(*args, **kwargs)
            self._clock += 1
            run.ended = self._clock
            try:
                run.shapes = [tuple(x.shape) for x in tensors_in(out)]
            except UnknownContent:
                return out
            if self._keeps:
                run.output = with_tensors(out, _copy)
            return out

        return watched


def _copy(x: Tensor) -> Tensor:
    """What a tensor is now, whoever writes to it later."""
    with isolated(x):
        (made,) = snapshots([x], [False])
    return made


class Prefix:
    """What a model has returned before each of some sites begins.

    Args:
        model: the model.
        paths: of the sites.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]):
        self._inner: dict[str, nn.Module] = {}
        self._lead: dict[str, list[str]] = {}  # path of a site -> of the modules around it, the innermost first
        for path in dict.fromkeys(paths):
            around = _modules_around(model, path)
            self._inner.update(around)
            self._lead[path] = list(around)
        self._runs: dict[str, _Run] = {}
        self._axes: dict[str, list[int | None]] = {}  # of each tensor that is returned, the axis of the batch

    def watch(self, keeps: bool) -> Watched:
        """A block in which the model is to run once."""
        return Watched(self._inner, keeps)

    def learn(self, seen: Watched) -> None:
        """Take what was seen of the run that others go on from."""
        several = {path: runs[0] for path, runs in seen.runs.items() if len(runs) == 1}
        self._runs = {path: run for path, run in several.items() if run.ended >= 0}
        needed = {path for site in self._lead for path in self.before([site])}
        for path, run in self._runs.items():
            if path not in needed:
                run.output = run.shapes = None

    def learn_batch(self, seen: Watched) -> None:
        """Take what was seen of a run of twice the batch, which tells the axis of the batch."""
        for path, run in self._runs.items():
            several = seen.runs.get(path, [])
            if run.shapes is None:
                continue
            doubled = several[0].shapes if len(several) == 1 else None
            axes = _batch_axes(run.shapes, doubled or [])
            if axes is None:
                run.output = run.shapes = None
            else:
                self._axes[path] = axes

    def before(self, sites: Iterable[str]) -> list[str]:
        """The paths of the modules that have ended before the first of some sites begins, the outermost ones."""
        begun = [self._begun(site) for site in sites]
        if not begun or None in begun:
            return []
        first = min(x for x in begun if x is not None)
        ended = {path: run for path, run in self._runs.items() if run.ended < first and run.shapes is not None}
        return [path for path, run in ended.items() if not any(run.inside(other) for other in ended.values())]

    def _begun(self, site: str) -> int | None:
        return next((self._runs[path].begun for path in self._lead.get(site, ()) if path in self._runs), None)

    @property
    def last(self) -> str | None:
        """The site that most has ended before."""
        begun = {site: begun for site in self._lead if (begun := self._begun(site)) is not None}
        return max(begun, key=lambda site: begun[site]) if begun else None

    def skipped(self, sites: Iterable[str], times: int = 1) -> Exchanged:
        """A block in which nothing runs that has ended before the first of some sites begins.

        Args:
            sites: their paths.
            times: how many copies of the input the batch has, one after the other.
        """
        return Exchanged((self._inner[path], self._again(path, times)) for path in self.before(sites))

    def _again(self, path: str, times: int) -> Callable[..., Any]:
        output, axes = self._runs[path].output, self._axes.get(path)

        def forward(*_: Any, **__: Any) -> Any:
            left = iter(axes or ())
            return with_tensors(output, lambda x: repeated(x, times, next(left)) if times > 1 else _copy(x))

        return forward


def repeated(x: Tensor, times: int, axis: int | None = 0) -> Tensor:
    """A tensor so many times along an axis; None: it has no axis of the batch."""
    if axis is None:
        return _copy(x)
    return x.repeat([times if i == axis else 1 for i in range(x.dim())])


def _modules_around(model: nn.Module, path: str) -> dict[str, nn.Module]:
    """The modules that a path leads through, by their paths, the innermost first; not the model itself."""
    found: dict[str, nn.Module] = {}
    module, parts = model, path.split(".") if path else []
    for i, part in enumerate(parts):
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            break
        module = child
        found[".".join(parts[: i + 1])] = module
    return dict(reversed(found.items()))


def _batch_axes(single: Sequence[tuple[int, ...]], double: Sequence[tuple[int, ...]]) -> list[int | None] | None:
    """Of each tensor the one axis that is twice as long, None where none is; None in all: they differ otherwise."""
    if len(single) != len(double) or any(len(a) != len(b) for a, b in zip(single, double, strict=True)):
        return None
    found: list[int | None] = []
    for a, b in zip(single, double, strict=True):
        other = [i for i, (m, n) in enumerate(zip(a, b, strict=True)) if m != n]
        if len(other) > 1 or any(b[i] != 2 * a[i] for i in other):
            return None
        found.append(other[0] if other else None)
    return found
