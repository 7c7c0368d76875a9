"""Where the axes of every tensor come from, while a model runs."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import axis_history
from .axis_history import Origin, same
from .operation import OperationKind
from .view_rules import same_axes

# Entries of tensors that are gone are swept out when there are so many. A callback of each weak reference would do it
# at once, and run for every tensor that a model makes.
_PURGE = 4096
_NONE: dict[str, Any] = {}
_ref = weakref.ref


class Origins:
    """The origins of the tensors that are alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Origin]] = {}

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()

    def knows(self, x: Tensor) -> bool:
        """Whether anything is known of where the axes of a tensor come from."""
        known = self._known.get(id(x))
        return known is not None and known[0]() is x

    def of(self, x: Tensor) -> Origin:
        """Where the axes of a tensor come from."""
        known = self._known.get(id(x))
        if known is not None and known[0]() is x and known[1].shape == x.shape:
            return known[1]
        return self.set(x, Origin(x.shape))

    def set(self, x: Tensor, origin: Origin) -> Origin:
        """Say where the axes of a tensor come from."""
        if len(self._known) > _PURGE:
            self._known = {i: e for i, e in self._known.items() if e[0]() is not None}
        self._known[id(x)] = (_ref(x), origin)
        return origin

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
                    origin = source if shape == source.shape else Origin(shape)
                else:
                    how = rule(x, out, args, kwargs or _NONE)
                    origin = Origin(shape) if how is None else Origin(shape, how[0], source, how[1])
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
        if x is None:
            x = args[0] if args and id(args[0]) in self._known else self._source(args, kwargs, out)
            if x is None:
                return Origin(())
        if source is None:
            source = self.of(x)
        origin = source
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if one is x or not strided(one):
                return source
            how = kind.axes(x, one, args, kwargs)
            if how is None:
                origin = Origin(one.shape)
            elif how[0] is same:
                origin = source if one.shape == source.shape else Origin(one.shape)
            else:
                origin = Origin(one.shape, how[0], source, how[1])
            if kind.splits:
                origin.piece_of = source
            elif kind.joins:
                origin = self._joined(origin, one, args, kwargs)
            self.set(one, origin)
        return origin

    def _joined(self, origin: Origin, out: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Origin:
        """Tensors laid end to end, maybe pieces of one tensor along another dimension than they were cut."""
        parts = [self.of(t) for t in args[0] if strided(t)]
        whole = parts[0].piece_of if parts else None
        if origin is parts[0]:
            origin = Origin(out.shape, same, origin)
        if whole is None or len(parts) != len(args[0]) or any(p.piece_of is not whole for p in parts):
            return origin
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.dim()
        stacked = out.dim() > len(parts[0].shape)
        if not stacked and (out.shape[dim] != parts[0].shape[dim] * len(parts) or out.shape[dim] == whole.shape[dim]):
            return origin
        return Origin(out.shape, axis_history.joined, parts[0], (dim, len(parts), stacked))

    def _source(self, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Tensor | None:
        """The argument whose axes the result has: the first that is followed, else the first there is."""
        n = out.dim() if strided(out) else None
        first = None
        for arg in (*args, *kwargs.values()) if kwargs else args:
            for one in arg if isinstance(arg, (list, tuple)) else (arg,):
                if strided(one):
                    if id(one) in self._known and (n is None or one.dim() == n or first is None):
                        return one  # type: ignore[no-any-return]
                    if first is None:
                        first = one
        return first


def strided(x: Any) -> bool:
    """A strided tensor: one whose axes can be followed."""
    return isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested
