"""Where the axes of every tensor come from, while a model runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import axis_history
from .axis_history import Cut, Origin, same, seeded
from .cuts import place_in
from .decisions import see
from .operation import OperationKind
from .view_rules import AxesRule, dim_dropped, indexed, map_of, resized, same_axes

# Entries of tensors that are gone are swept out when there are so many. A callback of each weak reference would do it
# at once, and run for every tensor that a model makes.
_PURGE = 4096
_NONE: dict[str, Any] = {}
# Of operations whose result may be a part of their argument: its entries, those of one dimension, or some of these.
_TAKES = (dim_dropped, indexed, resized)
_ref = weakref.ref


class Origins:
    """The origins of the tensors that are alive.

    Args:
        inside: whether the model is running, and not who calls it.
    """

    def __init__(self, inside: Callable[[], bool] | None = None) -> None:
        self._inside = inside or _always
        self._known: dict[int, tuple[weakref.ref[Tensor], Origin]] = {}
        self._marks: dict[int, tuple[weakref.ref[Tensor], object]] = {}

    def clear(self) -> None:
        """Forget everything, and who may be asked whether the model runs: that is what has these origins."""
        self._known.clear()
        self._marks.clear()
        self._inside = _always

    def knows(self, x: Tensor) -> bool:
        """Whether anything is known of where the axes of a tensor come from."""
        known = self._known.get(id(x))
        return known is not None and known[0]() is x

    def peek(self, x: Tensor) -> Origin | None:
        """What is known of where the axes of a tensor come from; None: nothing."""
        known = self._known.get(id(x))
        return known[1] if known is not None and known[0]() is x else None

    def of(self, x: Tensor) -> Origin:
        """Where the axes of a tensor come from."""
        known = self._known.get(id(x))
        if known is not None and known[0]() is x and known[1].shape == x.shape:
            return known[1]
        return self.set(x, Origin(x.shape, birth="parameter" if isinstance(x, nn.Parameter) else "data"))

    def set(self, x: Tensor, origin: Origin) -> Origin:
        """Say where the axes of a tensor come from."""
        if len(self._known) > _PURGE:
            self._known = {i: e for i, e in self._known.items() if e[0]() is not None}
            self._marks = {i: m for i, m in self._marks.items() if m[0]() is not None}
        self._known[id(x)] = (_ref(x), origin)
        return origin

    def seed(self, x: Tensor, roles: str) -> None:
        """Say what the axes of a tensor are, a letter of B H T S D each."""
        self.set(x, seeded(x.shape, tuple(roles), self.of(x) if self.knows(x) else None))

    def note(self, kind: OperationKind, args: Sequence[Any], kwargs: dict[str, Any] | None, out: Any) -> None:
        """Say where the axes of the results of an operation come from. Runs for every operation: it has to be quick."""
        if type(out) is Tensor and args and not (kind.joins or kind.splits):
            x: Tensor = args[0]
            known = self._known.get(id(x))
            if known is not None and known[0]() is x and x is not out:
                source = known[1]
                rule = kind.axes
                try:
                    shape = out.shape
                except RuntimeError:  # a nested tensor
                    return
                if rule is same_axes:  # most operations: no function is called, and no origin is made
                    if shape == source.shape and source.birth != "parameter":
                        self._known[id(out)] = (_ref(out), source)
                        return
                elif kind.operand == 0:
                    how = rule(x, out, args, kwargs or _NONE)
                    origin = Origin(shape, birth="lost") if how is None else Origin(shape, how[0], source, how[1])
                    if rule in _TAKES:
                        origin = self._taken(rule, origin, source, x, out, args, kwargs or _NONE)
                    self._known[id(out)] = (_ref(out), origin)
                    return
        self.derive(kind, args, kwargs or _NONE, out)

    def derive(
        self,
        kind: OperationKind,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        out: Any,
        x: Tensor | None = None,
        source: Origin | None = None,
    ) -> Origin:
        """As :meth:`note`, of any results of any operation; returns the origin of the last.

        Args:
            kind: the operation.
            args: its arguments.
            kwargs: its keyword arguments.
            out: its result or results.
            x: the argument whose axes count; None: found among the arguments.
            source: the origin of ``x`` if it is known better than :meth:`of` would.
        """
        if kind.pours:
            return self._poured(args)
        if x is None:
            x = self._source(kind, args, kwargs, out)
            if x is None:
                return Origin(())
        if source is None:
            source = self.of(x)
        origin = source
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if one is x or not strided(one):
                return source
            if kind.joins:
                origin = self._joined(one, args, kwargs)
            elif (how := kind.axes(x, one, args, kwargs)) is None:
                origin = Origin(one.shape, birth="lost")
            elif how[0] is not same:
                origin = Origin(one.shape, how[0], source, how[1])
            elif one.shape != source.shape:
                origin = self._broadcast(one, x, source, args, kwargs)
            else:
                origin = source
            if kind.joins:
                origin.cut = None  # and so what grows by a piece each step does not keep all that it was
            elif kind.axes in _TAKES and origin is not source:
                origin = self._taken(kind.axes, origin, source, x, one, args, kwargs)
            self.set(one, origin)
        return origin

    def _taken(
        self,
        rule: AxesRule,
        origin: Origin,
        source: Origin,
        x: Tensor,
        out: Tensor,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Origin:
        """The origin of what was taken out of a tensor; ``origin``: what its axes alone tell of it."""
        if rule is indexed and source.birth == "parameter" and _looks_up(x, args[1]):
            origin = Origin(out.shape, axis_history.embedded, self.of(args[1]), map_of(x))
        elif rule is not resized:
            _one_entry(rule, origin, source, x, args, kwargs)
        # What a caller cuts is whole to the model.
        place = see(self._cut, x, out)
        if place is not None:
            self.set_mark(x, place[-1])  # which it has, unless what is followed now ran before
            if self._inside():
                origin.cut = Cut(source, *place)
        return origin

    def _cut(self, x: Tensor, out: Tensor) -> tuple[tuple[int, ...], int, int, object] | None:
        """Where a view of a tensor lies in it, as a :class:`Cut` has it; None: it is no part of it."""
        place = place_in(x, out)
        return None if place is None else (*place, self.mark(x))

    def mark(self, x: Tensor) -> object:
        """What tells a tensor that pieces are cut off from others."""
        known = self.peek_mark(x)
        return self.set_mark(x, object()) if known is None else known

    def peek_mark(self, x: Tensor) -> object | None:
        """The same; None: no piece was cut off it."""
        known = self._marks.get(id(x))
        return known[1] if known is not None and known[0]() is x else None

    def set_mark(self, x: Tensor, mark: object) -> object:
        """Say what tells a tensor from others."""
        self._marks[id(x)] = _ref(x), mark
        return mark

    def _joined(self, out: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Origin:
        """Tensors laid end to end; the axes are those of the first that is not made of parameters alone.

        One that something is known of counts before one that appeared, as zeros do that a sequence is padded with.
        """
        tensors = args[0] if args else kwargs["tensors"]
        if out.dim() > 1:  # an empty vector may be laid before anything, as a cache begins with one
            tensors = [t for t in tensors if not (strided(t) and t.dim() == 1 and not t.numel())]
        dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
        if not tensors or not all(map(strided, tensors)) or not isinstance(dim, int):
            return Origin(out.shape, birth="lost")
        followed = [self.of(t) for t in tensors if self.knows(t)]
        parts = [self.of(t) for t in tensors]
        new = out.dim() > len(parts[0].shape)
        first = next((p for p in (*followed, *parts) if p.birth != "parameter"), parts[0])
        return Origin(out.shape, axis_history.joined, first, (dim % out.dim(), new, parts))

    def _broadcast(self, out: Tensor, x: Tensor, source: Origin, args: Sequence[Any], kwargs: dict[str, Any]) -> Origin:
        """Several tensors, none of which has the shape of the result: each axis is of one that has its extent."""
        others = [self.of(t) for t in (*args, *kwargs.values()) if strided(t) and t is not x and t.dim() <= out.dim()]
        parts = [source, *others] if len(source.shape) <= out.dim() else others
        parts.sort(key=lambda p: p.birth == "parameter")  # what is given counts before what was learned
        fit = all(n in (1, m) for p in parts for n, m in zip(p.shape[::-1], out.shape[::-1], strict=False))
        if not parts or not fit:
            return Origin(out.shape, birth="lost")
        return Origin(out.shape, axis_history.broadcast, parts[0], parts)

    def _poured(self, args: Sequence[Any]) -> Origin:
        """A tensor was written into another: a buffer that nothing is known of has the axes of what is in it."""
        target, value = args[0], args[-1]
        if not strided(target):
            return Origin(())
        if not strided(value) or value.dim() == 0 or not self.knows(value) or self.knows(target):
            return self.of(target)
        index = args[1] if len(args) > 2 else ...
        how = indexed(target, value, (target, index), {})
        if how is None or how[0] is not axis_history.keep_dims or None in how[1] or len(how[1]) != value.dim():
            return self.of(target)
        place = {dim: i for i, dim in enumerate(how[1])}
        where = [place.get(dim) for dim in range(target.dim())]
        return self.set(target, Origin(target.shape, axis_history.surrounded, self.of(value), where))

    def _source(self, kind: OperationKind, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Tensor | None:
        """The argument whose axes the result has.

        The one that the operation's row names; else one that is followed and has the shape of the result, of those one
        that is not made of parameters alone; else the first there is.
        """
        if kind.operand is not None and len(args) > kind.operand and strided(args[kind.operand]):
            return args[kind.operand]  # type: ignore[no-any-return]
        shape = out.shape if strided(out) else None
        best, rank = None, -1
        for arg in (*args, *kwargs.values()) if kwargs else args:
            for one in arg if isinstance(arg, (list, tuple)) else (arg,):
                if not strided(one):
                    continue
                known = self._known.get(id(one))
                followed = known is not None and known[0]() is one and known[1].birth != "parameter"
                mine = 4 * (shape is None or one.shape == shape) + 2 * followed + (known is not None)
                if mine > rank:
                    best, rank = one, mine
        return best


def _always() -> bool:
    return True


def _one_entry(
    rule: Any, origin: Origin, source: Origin, x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    """Note of which dimension a tensor is one entry."""
    if rule is dim_dropped:
        origin.entry_of(source, kwargs.get("dim", args[1] if len(args) > 1 else 0) % x.dim())
        return
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    numbers = [place for place, i in enumerate(index) if isinstance(i, int) and not isinstance(i, bool)]
    if len(numbers) == 1 and all(isinstance(i, (int, slice)) or i is Ellipsis for i in index):
        place = numbers[0]
        origin.entry_of(source, place if Ellipsis not in index[:place] else x.dim() - len(index) + place)


def _looks_up(x: Tensor, index: Any) -> bool:
    """Whether rows of a learned table are picked by numbers, as an embedding does."""
    numbers = isinstance(index, Tensor) and not isinstance(index, nn.Parameter)
    return numbers and x.dim() == 2 and index.dtype in (torch.int64, torch.int32)


def strided(x: Any) -> bool:
    """A strided tensor: one whose axes can be followed."""
    return isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested
