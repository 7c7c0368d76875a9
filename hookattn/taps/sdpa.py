"""``torch.nn.functional.scaled_dot_product_attention``: its real arguments, grouped heads undone, any batch shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..record import KernelCall
from . import axes
from .axes import Layout, Origin, refine, seeded
from .base import Tap
from .product import Label, LayoutError, Piece, Product, Roles, arrange

if TYPE_CHECKING:
    from .watch import Watch

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def bind(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The kernel's arguments by name."""
    return {**_DEFAULTS, **dict(zip(_NAMES, args, strict=False)), **kwargs}


def handle(
    watch: Watch,
    func: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    better: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Any:
    """Run the kernel as the model asked for, and report it; ``better`` may know what its arguments were made from."""
    out = func(*args, **kwargs)
    with torch.no_grad():
        given = bind(args, kwargs)
        if any(t.is_nested for t in (given["query"], given["key"], given["value"])):
            watch.recorder.skip("scaled_dot_product_attention on nested tensors")
            return out
        undropped = None
        if given["dropout_p"]:
            undropped = func(**{**given, "dropout_p": 0.0})
        try:
            watch.recorder.record(read(watch, given if better is None else better(given), out, undropped))
        except LayoutError as error:
            watch.recorder.skip(f"scaled_dot_product_attention: {error}")
    return out


def read(watch: Watch, given: dict[str, Any], out: Tensor, undropped: Tensor | None) -> KernelCall:
    """One call of the kernel in the contract's layout."""
    q, k, v = (_cast(given[n], out.dtype) for n in ("query", "key", "value"))
    scale = given["scale"]
    call = KernelCall(
        q=q,
        k=k,
        v=v,
        output=out,
        tap="sdpa",
        undropped=undropped,
        scale=float(scale) if scale is not None else q.shape[-1] ** -0.5,
        causal=bool(given["is_causal"]),
        dropout=float(given["dropout_p"]),
    )
    known = [watch.origins.knows(given[name]) for name in ("query", "key", "value")]
    if known[0] and known[1]:
        call.crosses = not watch.origin(given["query"]).roots & watch.origin(given["key"]).roots
    mask = given["attn_mask"]
    if mask is not None:
        if mask.dtype == torch.bool:
            call.mask = mask
        else:
            call.bias, call.mask = watch.recorder.split(mask)
    if q.dim() == 4 and (not any(known) or _plain(watch, given)):
        call.bias, call.mask = (
            None if m is None else m.reshape((1,) * (4 - m.dim()) + tuple(m.shape)) for m in (call.bias, call.mask)
        )
        return call
    return _arranged(watch, given, call)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _plain(watch: Watch, given: dict[str, Any]) -> bool:
    """B H T D as it stands: no copies made for grouped queries, no heads packed into the rows of a query."""
    for name in ("key", "value"):
        layout = watch.origin(given[name]).layout()
        if len(layout) == 4 and any(a.repeated for a in layout[1]):
            return False
    layout = watch.origin(given["query"]).layout()
    if len(layout) != 4:
        return False
    widths = {p for a in layout[3] for p in a.lineage()}
    return not any(a.role == "H" or any(p in widths for p in a.lineage()) for a in layout[2])


def _arranged(watch: Watch, given: dict[str, Any], call: KernelCall) -> KernelCall:
    """Heads folded into the batch or the queries, more batch dimensions, repeated keys: told apart by their history."""
    q, k, v = call.q, call.k, call.v
    n = q.dim()
    if k.dim() != n or v.dim() != n:
        raise LayoutError(f"q, k, v of {n}, {k.dim()} and {v.dim()} dimensions")
    first_is_batch = n == 4
    origins = {x: _known(watch.origin(given[x]), given[x]) for x in ("query", "key", "value")}
    if given["enable_gqa"] and n > 2 and k.shape[-3] != q.shape[-3]:  # the kernel groups by itself: spell it out
        groups = k.shape[-3]
        q = _split_heads(q, groups)
        k, v = k.unsqueeze(-3), v.unsqueeze(-3)
        origins = {x: Origin(t.shape, axes.reshape, origins[x]) for x, t in (("query", q), ("key", k), ("value", v))}
        for name in ("output", "undropped", "bias", "mask"):
            x = getattr(call, name)
            if x is not None and x.dim() > 2:
                setattr(call, name, _split_heads(x, groups) if x.shape[-3] != 1 else x.unsqueeze(-3))
        n += 1
    batch = list(range(n - 2))
    labels: tuple[list[Label], list[Label], list[Label]] = ([*batch, "t", "d"], [*batch, "s", "d"], [*batch, "t", "s"])
    product = Product(q, k, labels, origins["query"], origins["key"])
    extents = [max(a, b) for a, b in zip(q.shape[:-2], k.shape[:-2], strict=True)]
    layout = product.layout((*extents, q.shape[-2], k.shape[-2]))
    roles = Roles(product, layout[-1])
    if not layout[-1]:
        roles.keys = "b"
    if first_is_batch:
        roles.heads = {a for a in roles.heads if a not in layout[0]} | {a for dim in layout[1:-2] for a in dim}
    call.q = arrange(q, product.operand_pieces("a", roles), "BHTD")
    call.k = arrange(k, product.operand_pieces("b", roles), "BHSD", group=True)
    call.v = arrange(v, _value_pieces(v, origins["value"], layout, roles), "BHSD", group=True)
    groups = max(call.k.shape[1], call.v.shape[1])
    call.k, call.v = (
        x if x.shape[1] == groups else x.repeat_interleave(groups // x.shape[1], 1) for x in (call.k, call.v)
    )
    call.k, call.v = (x.expand(call.q.shape[0], -1, -1, -1) for x in (call.k, call.v))
    rows = roles.pieces(layout[:-1])
    for name in ("output", "undropped"):
        x = getattr(call, name)
        if x is not None:
            setattr(call, name, arrange(x, [*rows, [Piece(x.shape[-1], "D")]], "BHTD"))
    for name in ("bias", "mask"):
        x = getattr(call, name)
        if x is not None:
            x = x.reshape((1,) * (len(layout) - x.dim()) + tuple(x.shape))
            setattr(call, name, arrange(x, roles.pieces(layout, x.shape), "BHTS", broadcast=True))
    return call


def _split_heads(x: Tensor, groups: int) -> Tensor:
    return x.reshape(*x.shape[:-3], groups, x.shape[-3] // groups, *x.shape[-2:])


def _known(origin: Origin, x: Tensor) -> Origin:
    """The history of an operand; with four dimensions the first two are batch and heads, by the kernel's own word."""
    layout = origin.layout()
    if x.dim() == 4 and not any(a.role or a.repeated or a.parent for dim in layout for a in dim):
        return seeded(x.shape, ("B", "H", None, None))
    return origin


def _value_pieces(v: Tensor, origin: Origin, layout: Layout, roles: Roles) -> list[list[Piece]]:
    """``v`` has the batch axes of the scores, the keys, and its own width."""
    own, out = origin.layout(), []
    for i, extent in enumerate(v.shape[:-2]):
        pairs = refine(layout[i], own[i]) if extent != 1 and len(own) == v.dim() else None
        atoms = [(a, o.repeated) for a, o in pairs] if pairs else [(a, False) for a in layout[i]]
        out.append([Piece(a.size, roles.of(a), broadcast=extent == 1, repeated=r) for a, r in atoms])
    return [*out, [Piece(v.shape[-2], "S")], [Piece(v.shape[-1], "D")]]


TAP = Tap("sdpa", kernels={"scaled_dot_product_attention": handle})
