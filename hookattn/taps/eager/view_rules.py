"""The view-like operations of torch, by name: how each one's arguments map old axes to new ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import axis_history
from .axis_history import Layout, Origin

How = tuple[Callable[..., Layout], Any]
View = Callable[[Tensor, Any, Sequence[Any], dict[str, Any]], How | None]


def _ints(args: Sequence[Any]) -> list[int]:
    if len(args) == 1 and not isinstance(args[0], int):
        return list(args[0])
    return list(args)


def _reshape(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> How | None:
    return (axis_history.reshape, None) if out.numel() == x.numel() else None


def same_axes(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> How | None:
    return axis_history.same, None


def _expand(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> How | None:
    return axis_history.expand, None


def _resized(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> How | None:
    return axis_history.resized, None


def _transpose(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> How | None:
    if len(args) == 3:
        return axis_history.transpose, (args[1], args[2])
    a = kwargs.get("dim0", kwargs.get("axis0", args[1] if len(args) > 1 else 0))
    b = kwargs.get("dim1", kwargs.get("axis1", args[2] if len(args) > 2 else 1))
    return axis_history.transpose, (a, b)


def _mt(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> How | None:
    n = x.dim()
    return (axis_history.permute, [*range(n - 2), n - 1, n - 2]) if n >= 2 else (axis_history.same, None)


def _full_t(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> How | None:
    return axis_history.permute, list(range(x.dim()))[::-1]


def _permute(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> How | None:
    order = kwargs.get("dims", args[1:])
    return axis_history.permute, [d % x.dim() for d in _ints(order)]


def _movedim(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> How | None:
    n = x.dim()
    src: Any = kwargs.get("source", args[1] if len(args) > 1 else None)
    dst: Any = kwargs.get("destination", args[2] if len(args) > 2 else None)
    src = [d % n for d in ([src] if isinstance(src, int) else src)]
    dst = [d % n for d in ([dst] if isinstance(dst, int) else dst)]
    rest = iter([d for d in range(n) if d not in src])
    back = dict(zip(dst, src, strict=True))
    return axis_history.permute, [back[d] if d in back else next(rest) for d in range(n)]


def _repeat(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> How | None:
    counts = _ints(kwargs.get("repeats", kwargs.get("dims", args[1:])))
    return axis_history.repeat, [1] * (out.dim() - len(counts)) + counts


def _interleave(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> How | None:
    count = kwargs.get("repeats", args[1] if len(args) > 1 else None)
    dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
    if not isinstance(count, int) or dim is None:
        return None
    return axis_history.interleave, (dim % x.dim(), count)


def _drop(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> How | None:
    """unbind and select: one dimension goes."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % x.dim()
    return axis_history.keep_dims, [i for i in range(x.dim()) if i != dim]


def _getitem(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> How | None:
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


def _stack(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> How | None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.dim()
    kept: list[int | None] = list(range(x.dim()))
    kept.insert(dim, None)
    return axis_history.keep_dims, kept


def _linear(x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> How | None:
    return axis_history.mapped, None


_SAME = (
    "contiguous clone detach to float half double bfloat16 type type_as requires_grad_ dropout nan_to_num "
    "layer_norm rms_norm roll flip masked_fill where triu tril cpu cuda softmax alias"
)

VIEWS: dict[str, View] = {
    **dict.fromkeys(_SAME.split(), same_axes),
    **dict.fromkeys(
        (
            "view",
            "reshape",
            "flatten",
            "unflatten",
            "squeeze",
            "unsqueeze",
            "view_as",
            "reshape_as",
            "ravel",
            "_unsafe_view",
        ),
        _reshape,
    ),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "transpose_"), _transpose),
    **dict.fromkeys(("t", "adjoint", "mT"), _mt),
    "T": _full_t,
    "permute": _permute,
    **dict.fromkeys(("movedim", "moveaxis"), _movedim),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "repeat_interleave": _interleave,
    **dict.fromkeys(
        (
            "split",
            "chunk",
            "split_with_sizes",
            "tensor_split",
            "narrow",
            "cat",
            "concat",
            "concatenate",
            "pad",
            "hsplit",
            "index_select",
        ),
        _resized,
    ),
    **dict.fromkeys(("unbind", "select"), _drop),
    "__getitem__": _getitem,
    "stack": _stack,
    "linear": _linear,
}


def follow(name: str, source: Origin, x: Tensor, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> How | None:
    """How ``out`` (a result of ``name`` on ``x``) gets its axes from those of ``x``; None where nothing is known."""
    view = VIEWS.get(name)
    if view is None:
        return (axis_history.same, None) if out.shape == source.shape else None
    return view(x, out, args, kwargs)
