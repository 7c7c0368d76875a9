"""How the axes of a result come from those of the first argument: the ``axes`` column of the table of operations.

Every rule takes the first argument, the result, and all arguments. It reads from the arguments which change of the
layout the operation is, and gives None where that can't be told. The change itself is worked out only if an attention
call asks for it (:mod:`.axis_history`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import axis_history
from .axis_history import Layout

# One of the functions of axis_history and its last argument. A plain tuple, as most operations that run make one.
LayoutChange = tuple[Callable[..., Layout], Any]
AxesRule = Callable[[Tensor, Any, Sequence[Any], dict[str, Any]], LayoutChange | None]


def _ints(args: Sequence[Any]) -> list[int]:
    if len(args) == 1 and not isinstance(args[0], int):
        return list(args[0])
    return list(args)


def reshaped(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """Row-major regrouping, if no entry is left out."""
    return (axis_history.reshape, None) if out.numel() == x.numel() else None


def same_axes(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """The axes are those of the argument, as long as the shape is."""
    return axis_history.same, None


def expanded(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """Dimensions are broadcast."""
    return axis_history.expand, None


def resized(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """The same dimensions, some of another extent."""
    return axis_history.resized, None


def transposed(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """Two dimensions change places."""
    if len(args) == 3:
        return axis_history.transpose, (args[1], args[2])
    a = kwargs.get("dim0", kwargs.get("axis0", args[1] if len(args) > 1 else 0))
    b = kwargs.get("dim1", kwargs.get("axis1", args[2] if len(args) > 2 else 1))
    return axis_history.transpose, (a, b)


def transposed_matrix(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """The last two dimensions change places."""
    n = x.dim()
    return (axis_history.permute, [*range(n - 2), n - 1, n - 2]) if n >= 2 else (axis_history.same, None)


def reversed_dims(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """All dimensions in reverse order."""
    return axis_history.permute, list(range(x.dim()))[::-1]


def permuted(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """Dimensions in the order that is given."""
    order = kwargs.get("dims", args[1:])
    return axis_history.permute, [d % x.dim() for d in _ints(order)]


def dims_moved(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """Some dimensions move to other places, and the others keep their order."""
    n = x.dim()
    src: Any = kwargs.get("source", args[1] if len(args) > 1 else None)
    dst: Any = kwargs.get("destination", args[2] if len(args) > 2 else None)
    src = [d % n for d in ([src] if isinstance(src, int) else src)]
    dst = [d % n for d in ([dst] if isinstance(dst, int) else dst)]
    rest = iter([d for d in range(n) if d not in src])
    back = dict(zip(dst, src, strict=True))
    return axis_history.permute, [back[d] if d in back else next(rest) for d in range(n)]


def repeated(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """Copies of the whole."""
    counts = _ints(kwargs.get("repeats", kwargs.get("dims", args[1:])))
    return axis_history.repeat, [1] * (out.dim() - len(counts)) + counts


def interleaved(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """Copies of each entry, if all have equally many."""
    count = kwargs.get("repeats", args[1] if len(args) > 1 else None)
    dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
    if not isinstance(count, int) or dim is None:
        return None
    return axis_history.interleave, (dim % x.dim(), count)


def dim_dropped(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """One dimension goes: unbind and select."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % x.dim()
    return axis_history.keep_dims, [i for i in range(x.dim()) if i != dim]


def indexed(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """Indexing with numbers, slices, None and ``...``; nothing is known of an index that is a tensor."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    kept: list[int | None] = []
    plain = [i for i in index if i is not None and i is not Ellipsis]
    if any(not isinstance(i, (int, slice)) or isinstance(i, bool) for i in plain):
        return None
    dim = 0
    for i in index:
        if i is None:
            kept.append(None)
        elif i is Ellipsis:
            for _ in range(x.dim() - len(plain)):
                kept.append(dim)
                dim += 1
        else:
            if isinstance(i, slice):
                kept.append(dim)
            dim += 1
    kept.extend(range(dim, x.dim()))
    return axis_history.keep_dims, kept


def stacked(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """Tensors along a new dimension."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.dim()
    kept: list[int | None] = list(range(x.dim()))
    kept.insert(dim, None)
    return axis_history.keep_dims, kept


def mapped(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """A linear map of the last dimension."""
    return axis_history.mapped, None
