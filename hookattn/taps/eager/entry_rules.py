"""Which entry of its arguments each entry of the result of an operation is: the ``entries`` column of the table.

Every rule takes the operation and a function that gives the entries of an argument. It gives None where the operation
does more than move entries about.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .entries import Entries
from .operation import EntriesOf, Operation


def same_places(c: Operation, of: EntriesOf) -> Entries | None:
    """A cast or a copy: each entry is where it was."""
    return _unmoved(c, of) if c.position == 0 else None


def same_places_of_either(c: Operation, of: EntriesOf) -> Entries | None:
    """Arithmetic of two operands: each entry is where it was in the one that is followed, be it the second."""
    return _unmoved(c, of)


def _unmoved(c: Operation, of: EntriesOf) -> Entries | None:
    mine = of(c.x)
    return mine if mine is not None and c.out.shape == c.x.shape else None


def replayed(c: Operation, of: EntriesOf) -> Entries | None:
    """A view, a selection, a permutation: the operation does to the numbers of the entries what it does to them."""
    mine = of(c.x)
    if mine is None or c.position != 0:
        return None
    func, rest, kwargs = c.func, c.args[1:], c.kwargs
    return Entries(lambda i: func(i, *rest, **kwargs), [mine])


def padded(c: Operation, of: EntriesOf) -> Entries | None:
    """Padding: what is added is no entry of anything."""
    mine, pad = of(c.x), c.arg(1, "pad")
    if mine is None or pad is None or c.position != 0:
        return None
    return Entries(lambda i: F.pad(i, tuple(pad), value=-1), [mine])


def concatenated(c: Operation, of: EntriesOf) -> Entries | None:
    """Concatenation: each entry is one of one of the parts."""
    parts = c.args[0] if c.args else c.kwargs["tensors"]
    dim = c.arg(1, "dim", 0)
    return Entries(lambda *numbers: torch.cat(numbers, dim), [of(t) or _none(t) for t in parts])


def chosen(c: Operation, of: EntriesOf) -> Entries | None:
    """``where``: each entry is one of either tensor; a number has none."""
    if len(c.args) != 3:
        return None
    condition, one, two = (c.args[1], c.args[0], c.args[2]) if c.name == "where_method" else c.args
    if not isinstance(condition, Tensor):
        return None
    made = [(of(t) or _none(t)) if isinstance(t, Tensor) else _none(c.out) for t in (one, two)]
    return Entries(lambda a, b: torch.where(condition, a, b), made)


def written(c: Operation, of: EntriesOf) -> Entries | None:
    """``copy_`` and ``x[index] = value``: some entries of the target are those of the value now."""
    target, value = c.args[0], c.args[-1]
    before = of(target) or _none(target)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return before  # a fill: the values themselves say so
    what = of(value) or _none(value)
    index: Any = c.args[1] if c.name == "__setitem__" else ...

    def write(numbers: Tensor, new: Tensor) -> Tensor:
        numbers = numbers.clone()
        numbers[index] = new
        return numbers

    return Entries(write, [before, what])


def _none(x: Tensor) -> Entries:
    """Those of a tensor whose entries came from nowhere."""
    shape, device = x.shape, x.device
    return Entries(lambda: torch.full(shape, -1, device=device))
