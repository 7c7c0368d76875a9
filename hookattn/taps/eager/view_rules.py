"""How the axes of a result come from those of the first argument: the ``axes`` column of the table of operations.

Every rule takes the first argument, the result, and all arguments. It reads from the arguments which change of the
layout the operation is, and gives None where that can't be told. The change itself is worked out only if an attention
call asks for it (:mod:`.axis_history`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...torch_internals.tensor_identity import address_of
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


def unsqueezed(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """One new dimension."""
    at = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.dim()
    return axis_history.keep_dims, [*range(at), None, *range(at, x.dim())]


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
    """Indexing with numbers, slices, None and ``...``, and with tensors of numbers or booleans."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    tensors = any(isinstance(i, (Tensor, list)) for i in index)
    if any(isinstance(i, bool) or not (i is None or i is Ellipsis or isinstance(i, _INDICES)) for i in index):
        return None
    used = sum(_dims_of(i) for i in index)
    kept: list[int | tuple[int, ...] | None] = []
    picking: list[tuple[int, Any]] = []  # dimensions that are picked from, and what picks
    places: list[int] = []  # where in the index these stand
    before = dim = 0
    for place, i in enumerate(index):
        if i is None:
            kept.append(None)
        elif i is Ellipsis:
            kept.extend(range(dim, dim + x.dim() - used))
            dim += x.dim() - used
        elif isinstance(i, slice):
            kept.append(dim)
            dim += 1
        elif isinstance(i, int) and not tensors:
            dim += 1
        else:  # a number beside tensors counts as a tensor
            if not picking:
                before = len(kept)
            n = _dims_of(i)
            picking.append((dim, i) if n == 1 else (-1, tuple(range(dim, dim + n))))
            places.append(place)
            dim += n
    kept.extend(range(dim, x.dim()))
    if not picking:
        return axis_history.keep_dims, kept
    made = _picked(picking)
    # Where the tensors do not stand side by side, torch puts what they pick first.
    at = before if places == list(range(places[0], places[-1] + 1)) else 0
    return axis_history.picked, [*kept[:at], *made, *kept[at:]]


_INDICES = (int, slice, Tensor, list)


def _dims_of(index: Any) -> int:
    """How many dimensions a part of an index uses up."""
    if index is None or index is Ellipsis:
        return 0
    return index.dim() if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) else 1


def _picked(picking: Sequence[tuple[int, Any]]) -> list[int | tuple[int, ...] | None]:
    """For each dimension that tensors pick, the dimension whose entries they pick along it; several; None: unknown."""
    shapes: list[tuple[int | tuple[int, ...], tuple[int, ...]]] = []
    for dim, index in picking:
        if dim < 0:  # booleans over several dimensions pick one list of entries
            shapes.append((index, (2,)))
        elif isinstance(index, Tensor):
            shapes.append((dim, (2,) if index.dtype in (torch.bool, torch.uint8) else tuple(index.shape)))
        elif not isinstance(index, int):
            shapes.append((dim, tuple(torch.as_tensor(index).shape)))
    n = max((len(shape) for _, shape in shapes), default=0)
    vary = {d: [j for j in range(n) if len(shape) >= n - j and shape[j - n] != 1] for d, shape in shapes}
    made: list[int | tuple[int, ...] | None] = []
    for j in range(n):
        along = [d for d, axes in vary.items() if j in axes]
        # What varies along this axis alone names it: in x[rows[:, None], columns], columns vary along both perhaps.
        named = [d for d in along if len(vary[d]) == 1] or along
        made.append(named[0] if len(named) == 1 else None)
    return made


def unknown(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """An axis is summed over and another made: nothing is known of any, though the shape may be the argument's."""
    return None


def mapped(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """A learned map of the last dimension: ``linear(x, weight)``."""
    return axis_history.mapped, (-1, map_of(kwargs.get("weight", args[1] if len(args) > 1 else None)))


def mapped_and_added(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """``addmm(bias, x, weight)``."""
    return axis_history.mapped, (-1, map_of(kwargs.get("mat2", args[2] if len(args) > 2 else None)))


def convolved(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """A convolution: a learned map of the channels, and positions that stay in their order."""
    weight: Any = kwargs.get("weight", args[1] if len(args) > 1 else None)
    if weight is None or weight.dim() < 3 or x.dim() not in (weight.dim(), weight.dim() - 1):
        return None
    channels = 1 if x.dim() == weight.dim() else 0
    if weight.shape[1] == 1 and x.shape[channels] == out.shape[channels]:  # each channel by itself
        return axis_history.resized, None
    return axis_history.mapped, (channels, map_of(weight))


def embedded(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """``embedding(ids, weight)``: a last dimension of features."""
    return axis_history.embedded, map_of(kwargs.get("weight", args[1] if len(args) > 1 else None))


def indexed_by_list(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """``aten.index(x, indices)``: None stands for a dimension that is left as it is."""
    return indexed(x, out, (x, tuple(slice(None) if i is None else i for i in args[1])), kwargs)


def embedded_from(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """``aten.embedding(weight, ids)``; ``x``: the ids."""
    return embedded(x, out, (x, args[0]), {})


def gathered(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """``gather``: some entries of one dimension, which may be others for each entry of another."""
    return (axis_history.resized, None) if out.dim() == x.dim() else None


def windowed(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """``x.unfold(dim, size, step)``, and the function of that name that makes columns of images."""
    dim = kwargs.get("dimension", args[1] if len(args) > 1 else None)
    if x.dim() == 4 and out.dim() == 3:
        return axis_history.columns, None
    if not isinstance(dim, int) or out.dim() != x.dim() + 1:
        return None
    return axis_history.windowed, dim % x.dim()


def strided(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """``as_strided``: a dimension goes along that of the argument whose steps it takes, one at a time or several."""
    if not x.numel() or not out.numel():
        return None
    own = [(step, dim) for dim, step in enumerate(x.stride()) if x.shape[dim] > 1]
    kept: list[int | tuple[int, ...] | None] = []
    for step, extent in zip(out.stride(), out.shape, strict=True):
        if extent == 1:
            kept.append(None)
            continue
        along = max(((s, d) for s, d in own if s and s <= step and step % s == 0), default=None)
        if along is None:
            return None
        kept.append(along[1])
    return axis_history.picked, kept


def complex_pairs(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """``view_as_complex``."""
    return axis_history.pairs_as_numbers, None


def real_pairs(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """``view_as_real``."""
    return axis_history.numbers_as_pairs, None


def rearranged(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LayoutChange | None:
    """``rearrange(x, equation)``: an einsum of one operand. Known where it moves axes; where it sums over some, not."""
    left, arrow, right = args[1].replace(" ", "").partition("->")
    if not arrow:
        right = "".join(sorted(left))
    if "..." in left:
        dots = [chr(0x100 + i) for i in range(x.dim() - len(left) + 3)]
        left, right = left.replace("...", "".join(dots)), right.replace("...", "".join(dots))
    if len(set(left)) != len(left) or set(left) - set(right) or len(right) != len(left) or len(left) != x.dim():
        return None
    return axis_history.permute, [left.index(letter) for letter in right]


def rearrange(x: Tensor, equation: str) -> Tensor:
    """An einsum of one operand, which comes first, as in other views."""
    return torch.einsum(equation, x)


def rearranges(args: Sequence[Any]) -> tuple[Tensor, str] | None:
    """The operand and the equation of an einsum of one operand; None: it has several."""
    if not args or not isinstance(args[0], str):
        return None
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    return (operands[0], args[0]) if len(operands) == 1 and isinstance(operands[0], Tensor) else None


def map_of(weight: Any) -> Any:
    """What tells a learned map from others: the parameter, or where the part of it lies that was taken."""
    if not isinstance(weight, Tensor) or isinstance(weight, nn.Parameter):
        return id(weight)
    if weight.is_meta:  # it has no address, or none any more
        return "gone", id(weight)
    return "address", address_of(weight)
