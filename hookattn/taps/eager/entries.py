"""Where every entry of a tensor came from: scores and weights that are shifted, cut up, and poured into buffers.

Moving entries about does the same to their numbers: the operations that moved them run again on numbers instead, once a
softmax and a product with values have shown that it is worth it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CASTS = frozenset(
    "contiguous clone detach to float half double bfloat16 type type_as requires_grad_ alias nan_to_num dropout".split()
)
_SAME = frozenset(
    "mul multiply __mul__ __rmul__ __imul__ div divide true_divide __truediv__ __itruediv__ add __add__ __radd__ "
    "__iadd__ sub subtract __sub__ __isub__ masked_fill clamp clamp_min maximum".split()
)
_VIEWS = frozenset(
    "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as transpose swapaxes swapdims permute movedim "
    "moveaxis mT T t expand expand_as __getitem__ narrow select gather index_select take_along_dim flip roll unfold "
    "diagonal".split()
)

Number = Callable[[Any], int]


class Entries:
    """The numbers of a tensor's entries, made when they are asked for; −1 is none.

    Args:
        make: from the numbers of ``of`` to these.
        of: where the entries came from.
        source: instead, what has entries of its own, and their shape.
    """

    __slots__ = ("make", "of", "shape", "source")

    def __init__(
        self,
        make: Callable[..., Tensor] | None = None,
        of: Sequence[Entries] = (),
        source: Any = None,
        shape: tuple[int, ...] = (),
    ):
        self.make, self.of, self.source, self.shape = make, tuple(of), source, shape

    def sources(self) -> list[Any]:
        """What the entries came from in the first place, each once."""
        found: list[Any] = []
        waiting: list[Entries] = [self]
        while waiting:
            one = waiting.pop()
            if one.source is not None and all(one.source is not x for x in found):
                found.append(one.source)
            waiting.extend(reversed(one.of))
        return found

    def numbers(self, first: Number, device: torch.device) -> Tensor:
        """The number of every entry; ``first``: that of the first entry of a source."""
        if self.make is not None:
            return self.make(*(one.numbers(first, device) for one in self.of))
        n = 1
        for extent in self.shape:
            n *= extent
        return torch.arange(n, device=device).view(self.shape) + first(self.source)


def moved(
    name: str,
    func: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    x: Tensor,
    position: int,
    out: Any,
    of: Callable[[Any], Entries | None],
) -> Entries | None:
    """The entries of the result of an operation; None where it does more than move them.

    Args:
        name: the operation, in place or not.
        func: the function itself.
        args: its arguments.
        kwargs: its keyword arguments.
        x: the argument that is followed; the first where it is written to.
        position: its place among the arguments.
        out: the result.
        of: the entries of a tensor.
    """
    name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    mine = of(x)
    if name in ("__setitem__", "copy"):
        return _written(name, args, of)
    if name in ("cat", "concat", "concatenate"):
        parts = args[0] if args else kwargs["tensors"]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        return Entries(lambda *numbers: torch.cat(numbers, dim), [of(t) or _none(t) for t in parts])
    if name in ("where", "where_method") and len(args) == 3:
        condition, one, two = (args[1], args[0], args[2]) if name == "where_method" else args
        if isinstance(condition, Tensor):
            made = [(of(t) or _none(t)) if isinstance(t, Tensor) else _none(out) for t in (one, two)]
            return Entries(lambda a, b: torch.where(condition, a, b), made)
    if mine is None or (position != 0 and name not in _SAME):
        return None
    if name in CASTS or name in _SAME:
        return mine if out.shape == x.shape else None
    if name in ("pad", "constant_pad_nd"):
        pad = kwargs.get("pad", args[1] if len(args) > 1 else None)
        return None if pad is None else Entries(lambda i: F.pad(i, tuple(pad), value=-1), [mine])
    if name in _VIEWS:
        rest = args[1:]
        return Entries(lambda i: func(i, *rest, **kwargs), [mine])
    return None


def _none(x: Tensor) -> Entries:
    shape, device = x.shape, x.device
    return Entries(lambda: torch.full(shape, -1, device=device))


def _written(name: str, args: Sequence[Any], of: Callable[[Any], Entries | None]) -> Entries | None:
    target, value = args[0], args[-1]
    before = of(target) or _none(target)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return before  # a fill: the values themselves say so
    what = of(value) or _none(value)
    index = args[1] if name == "__setitem__" else ...

    def write(numbers: Tensor, new: Tensor) -> Tensor:
        numbers = numbers.clone()
        numbers[index] = new
        return numbers

    return Entries(write, [before, what])
