"""``torch.nn.functional.scaled_dot_product_attention``: its real arguments, grouped heads undone, any batch shape.

So are the kernels that it chooses from. Nobody is to call them by name, and graphs that were exported and taken apart
do: each returns its output and more beside it, and has its arguments in an order of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..attention.functional import with_four_axes
from ..attention.kernel_call import KernelCall
from ..attention.places import exchanged
from ..torch_internals.allocation import laid_as
from ..torch_internals.isolation import isolated, no_gradients
from ..torch_internals.operators import argument_defaults
from ..torch_internals.transforms import stands_for_others
from .base import ActiveTrace, Change, Tap
from .eager import axis_history
from .eager.axis_history import Layout, Origin, refine, seeded, shown
from .eager.products import Factor, HeadTest, LayoutError, Product, ProductLabels, Roles, arrange, arrangement
from .eager.sequences import describe_plain, describe_product

if TYPE_CHECKING:
    from .eager.follower import Follower

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
CHANGEABLE = frozenset({"q", "k", "v", "bias", "mask"})
"""What of a call can be handed to the kernel changed; an output can be exchanged after it."""


def bind(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The kernel's arguments by name."""
    return {**_DEFAULTS, **dict(zip(_NAMES, args, strict=False)), **kwargs}


def handle(watch: Follower, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run the kernel as the model asked for, and report it."""
    given = bind(args, kwargs)
    if watch.recorder.listened and _named(watch, given):
        return _handle_asked(watch, func, given)
    out = func(*args, **kwargs)
    if _nested(given):
        watch.recorder.skip("scaled_dot_product_attention on nested tensors")
        return out
    call = plain(watch.recorder, func, given, out)
    if watch.recorder.listened:
        return _answered(watch, "scaled_dot_product_attention", given, call)
    _report(watch, "scaled_dot_product_attention", given, call)
    return out


def _answered(watch: Follower, name: str, given: dict[str, Any], call: KernelCall) -> Tensor:
    """What the model gets of a kernel that could not be asked about before it ran, where somebody listens.

    Its operands are told apart by their history. What lies otherwise than B H T D cannot be handed in changed, but an
    output can be brought back to where the model has it.
    """
    out = call.output
    assert out is not None
    if stands_for_others(out):  # what is recorded of it is laid out otherwise
        _report(watch, name, given, call)
        return out
    try:
        with watch.recorder.aside():
            made, back = _in_layout(watch, given, call)
            instead = watch.recorder.after(made)
            new = out if instead is None else laid_as(back(instead.to(out.dtype)).reshape(out.shape), out)
        with isolated(out, but=watch.recorder.attached):
            watch.recorder.record(made)
    except LayoutError as error:
        watch.recorder.skip(f"{name}: {error}")
        return out
    return new


def _handle_asked(watch: Follower, func: Any, given: dict[str, Any]) -> Any:
    """The same where somebody listens: run with what the kernel shall be given."""
    repeats = _repeats(watch, given)
    asked = ask(watch.recorder, given, repeats, partial(_describe, watch, given))
    for name, groups in (("query", given["query"].shape[1]), ("key", asked.k.shape[1]), ("value", asked.v.shape[1])):
        # A changed tensor is what the model's was, as long as heads that were copies of one another are so still.
        x, own = asked.given[name], given[name]
        if x is not own and watch.origins.knows(own) and (name == "query" or groups * repeats == own.shape[1]):
            watch.set_origin(x, watch.origin(own))
    out = asked.run(func)
    call = plain(watch.recorder, func, asked.given, out)
    result = answer(watch.recorder, asked, call, out, partial(_describe, watch, given))
    _report(watch, "scaled_dot_product_attention", asked.given, call)
    return result


def _describe(watch: Follower, given: dict[str, Any], call: KernelCall) -> None:
    """Say of a call what the history of its operands tells."""
    query, key = given["query"], given["key"]
    if watch.origins.knows(query) or watch.origins.knows(key):
        describe_plain(call, watch.origin(query), watch.origin(key))


def _repeats(watch: Follower, given: dict[str, Any]) -> int:
    """How many copies of each key head the model has made before the kernel, one beside the other; 1: none."""
    found = []
    for name in ("key", "value"):
        heads = watch.origin(given[name]).layout()[1] if watch.origins.knows(given[name]) else ()
        copies = math.prod(a.size for a in heads if a.repeated)
        first = [a for a in heads if not a.repeated]
        found.append(copies if list(heads[: len(first)]) == first else 1)
    return found[0] if found[0] == found[1] else 1


def handle_chosen(name: str, watch: Follower, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run one of the kernels that are chosen from, and report it as a call of the function itself."""
    defaults = argument_defaults(name)
    own = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
    result = func(*args, **kwargs)
    out: Tensor = result[0]
    given = {**_DEFAULTS, **{key: own[key] for key in _NAMES if key in own}}
    mask: Tensor | None = own.get("attn_mask", own.get("attn_bias"))
    # The function turns booleans into 0 and -inf before it gets here; these add what they are given.
    given["attn_mask"] = mask.to(out.dtype) if mask is not None and mask.dtype == torch.bool else mask
    if _nested(given):
        watch.recorder.skip(f"{name} on nested tensors")
        return result

    def undropped(**_: Any) -> Any:
        without = {"dropout_p": 0.0, **({"dropout_mask": None} if "dropout_mask" in own else {})}
        return func(**{**own, **without})[0]

    call = plain(watch.recorder, undropped, given, out)
    if call.causal and name in _FROM_THE_END:
        call.offset = call.k.shape[-2] - call.q.shape[-2]
    if watch.recorder.listened:
        return (_answered(watch, name, given, call), *result[1:])
    _report(watch, name, given, call)
    return result


def handle_unread(name: str, watch: Follower, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run a kernel below those that are chosen from, and say that it is not read."""
    out = func(*args, **kwargs)
    watch.recorder.skip(f"aten.{name} was called by its own name, which is not read")
    return out


def _nested(given: dict[str, Any]) -> bool:
    return bool(given["query"].is_nested or given["key"].is_nested or given["value"].is_nested)


def _report(watch: Follower, name: str, given: dict[str, Any], call: KernelCall) -> None:
    assert call.output is not None
    try:
        with isolated(call.output, but=watch.recorder.attached):
            watch.recorder.record(read(watch, given, call))
    except LayoutError as error:
        watch.recorder.skip(f"{name}: {error}")


def _named(watch: Follower, given: dict[str, Any]) -> bool:
    """Whether the kernel is given B H T D, so that a changed q can be handed to it as it stands.

    Heads may be folded into the batch or into the rows of a query instead. Those can be read, by what is known of the
    tensors' history, but nothing here can fold a changed one in the same way.
    """
    q, k, v = given["query"], given["key"], given["value"]
    if q.is_nested or k.is_nested or v.is_nested or not q.dim() == k.dim() == v.dim() == 4:
        return False
    known = watch.origins.knows
    if not (known(q) or known(k) or known(v)):
        return True
    return _rows_are_queries(watch, q) and not _heads_lie_elsewhere(watch, given)


class Asked(NamedTuple):
    """What a kernel shall be run with.

    Attributes:
        given: its arguments by name, as they are recorded.
        k, v: B G S D and B G S E, as the listener was told them or has changed them.
        edits: what the listener has noted.
        first: the arguments of the run; ``given``, where there is but one.
        again: those of a second run, for some heads and rows; None: there is none.
        heads, rows: these; None: all.
    """

    given: dict[str, Any]
    k: Tensor
    v: Tensor
    edits: object
    first: dict[str, Any]
    again: dict[str, Any] | None = None
    heads: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None

    def run(self, func: Callable[..., Any]) -> Tensor:
        """What the kernel returns."""
        out: Tensor = func(**self.first)
        if self.again is None:
            return out
        return exchanged(out, (None, self.heads, self.rows), func(**self.again))


def ask(
    recorder: ActiveTrace,
    given: dict[str, Any],
    repeats: int = 1,
    describe: Callable[[KernelCall], None] | None = None,
    module: Any = None,
    grouped: tuple[Tensor, Tensor] | None = None,
) -> Asked:
    """What the kernel shall be run with.

    Args:
        recorder: the running trace.
        given: B H T D operands, by the kernel's names.
        repeats: how many copies of each key head it is given, one beside the other.
        describe: says of a call what else is known.
        module: the one that the kernel runs in.
        grouped: k and v of B G S D, where the kernel is given them repeated for every query head and somebody has those
            that were repeated.
    """
    q, mask, scale = given["query"], given["attn_mask"], given["scale"]
    if grouped is None:
        grouped = given["key"][:, ::repeats], given["value"][:, ::repeats]
    k, v = grouped if repeats > 1 or grouped[0].shape[1] != given["key"].shape[1] else (given["key"], given["value"])
    call = KernelCall(q, k, v, None, float(scale) if scale is not None else q.shape[-1] ** -0.5, "sdpa")
    call.causal, call.module, call.dropout = bool(given["is_causal"]), module, float(given["dropout_p"])
    if mask is not None:
        call.bias, call.mask = (None, mask) if mask.dtype == torch.bool else split_mask(recorder, mask)
        call.bias, call.mask = with_four_axes(call.bias), with_four_axes(call.mask)
    if describe is not None:
        describe(call)
    change = recorder.before(call, CHANGEABLE)
    if change is None:
        return Asked(given, k, v, call.edits, given)
    changed = dict(given)
    for name, x in (("query", change.q), ("key", change.k), ("value", change.v)):
        if x is not None:
            groups = given[name].shape[1] // x.shape[1]
            changed[name] = x.repeat_interleave(groups, 1) if groups > 1 else x
    k, v = k if change.k is None else change.k, v if change.v is None else change.v
    if change.bias is None and change.mask is None:
        return Asked(changed, k, v, call.edits, changed)
    first = dict(changed)
    changed["attn_mask"], changed["is_causal"] = _additive(call, change, given), False
    heads, rows = change.heads, change.queries
    if heads is None and rows is None:
        return Asked(changed, k, v, call.edits, changed)
    return Asked(changed, k, v, call.edits, first, _of_some(changed, heads, rows), heads, rows)


def split_mask(recorder: ActiveTrace, mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Bias and mask of an additive mask; a learned one stays in the model's graph."""
    bias, hidden = recorder.split(mask)
    if bias is not None and mask.requires_grad and torch.is_grad_enabled():
        bias = mask if hidden is None else torch.where(hidden, mask, 0.0)
    return bias, hidden


def _of_some(given: dict[str, Any], heads: tuple[int, ...] | None, rows: tuple[int, ...] | None) -> dict[str, Any]:
    """The kernel's arguments for some query heads and rows."""
    q, k, v = given["query"], given["key"], given["value"]
    mask = with_four_axes(given["attn_mask"])
    if heads is not None:
        of = torch.tensor(heads, device=q.device)
        h = q.shape[1]
        k, v = (x if x.shape[1] == 1 else x.index_select(1, of // (h // x.shape[1])) for x in (k, v))
        q, mask = q.index_select(1, of), mask if mask.shape[1] == 1 else mask.index_select(1, of)
    if rows is not None:
        at = torch.tensor(rows, device=q.device)
        q, mask = q.index_select(2, at), mask if mask.shape[2] == 1 else mask.index_select(2, at)
    # The heads are told one by one, so that nothing is left to group.
    grouped = given["enable_gqa"] and heads is None
    return {**given, "query": q, "key": k, "value": v, "attn_mask": mask, "enable_gqa": grouped}


def _additive(call: KernelCall, change: Change, given: dict[str, Any]) -> Tensor:
    """``attn_mask`` for a changed bias or mask; the kernel takes no flag beside it, so the diagonal is in it, too."""
    q, own, bias, mask = given["query"], given["attn_mask"], change.bias, change.mask
    if mask is None:
        mask = call.mask
    if bias is None and call.bias is not None:  # from the tensor itself, not from what was split off: a learned one
        bias = own if call.mask is None else torch.where(call.mask, own, 0.0)  # keeps its gradient
    if call.diagonal.hides_any:
        diagonal = call.diagonal.mask(q.shape[2], given["key"].shape[2], q.device)
        mask = diagonal if mask is None else mask & diagonal
    if bias is None:
        assert mask is not None
        return mask
    bias = bias.to(q.dtype)
    return bias if mask is None else torch.where(mask, bias, float("-inf"))


def answer(
    recorder: ActiveTrace,
    asked: Asked,
    call: KernelCall,
    out: Tensor,
    describe: Callable[[KernelCall], None] | None = None,
) -> Tensor:
    """What the model gets: the kernel's output, or what is to take its place.

    Args:
        recorder: the running trace.
        asked: what the kernel was run with.
        call: as it will be recorded, which gets what the listener has noted.
        out: what the kernel returned.
        describe: says of a call what else is known.
    """
    told = replace(call, edits=asked.edits)
    if asked.k.shape[1] != call.k.shape[1] and call.k.shape[1] % asked.k.shape[1] == 0:  # the model's copies left out
        told.k, told.v = asked.k, asked.v
    if call.bias is not None and asked.given["attn_mask"].requires_grad:
        told.bias = with_four_axes(split_mask(recorder, asked.given["attn_mask"])[0])
    if describe is not None:
        describe(told)
    instead = recorder.after(told)
    call.edits = told.edits
    if instead is None:
        return out
    if recorder.gradients:
        call.result = instead
    return instead.to(out.dtype)


def plain(recorder: ActiveTrace, func: Any, given: dict[str, Any], out: Tensor, module: Any = None) -> KernelCall:
    """One call of the kernel with B H T D operands as they stand; ``module``: the one it was told it runs in."""
    q, k, v, scale, mask = given["query"], given["key"], given["value"], given["scale"], given["attn_mask"]
    if not q.dtype == k.dtype == v.dtype == out.dtype:  # under autocast
        q, k, v = (x.to(out.dtype) for x in (q, k, v))
    if q.dim() == 4 and not (
        q.shape[:2] == out.shape[:2] and k.shape[:2] == v.shape[:2] and k.shape[0] == out.shape[0]
    ):
        q, k, v = full(q, k, v, out)
    call = KernelCall(q, k, v, out, float(scale) if scale is not None else q.shape[-1] ** -0.5, "sdpa")
    call.causal, call.module = bool(given["is_causal"]), module
    if recorder.gradients:
        call.result = out
    if given["dropout_p"]:
        call.dropout = float(given["dropout_p"])
        with no_gradients():
            call.undropped = func(**{**given, "dropout_p": 0.0})
    if mask is not None:
        if mask.dtype == torch.bool:
            call.mask = mask
        else:
            call.bias, call.mask = recorder.split(mask)
        if q.dim() == 4:
            call.bias, call.mask = with_four_axes(call.bias), with_four_axes(call.mask)
    return call


def full(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v whose batch or heads the kernel broadcasts (learned queries, say), at their full extents."""
    if not q.dim() == k.dim() == v.dim() == out.dim() == 4:
        return q, k, v
    b, h = out.shape[:2]
    q, k, v = q.expand(b, h, -1, -1), k.expand(b, -1, -1, -1), v.expand(b, -1, -1, -1)
    groups = max(k.shape[1], v.shape[1])
    k, v = (x if x.shape[1] == groups else x.repeat_interleave(groups // x.shape[1], 1) for x in (k, v))
    return q, k, v


def read(watch: Follower, given: dict[str, Any], call: KernelCall) -> KernelCall:
    """The call in the contract's layout, whatever the kernel was given."""
    return _in_layout(watch, given, call)[0]


def _in_layout(
    watch: Follower, given: dict[str, Any], call: KernelCall
) -> tuple[KernelCall, Callable[[Tensor], Tensor]]:
    """The same, and what brings an output in that layout, B H T E, back to the axes that it has in the model."""
    knows = watch.origins.knows
    followed = knows(given["query"]) or knows(given["key"]) or knows(given["value"])
    if call.q.dim() == 4 and (not followed or _plain(watch, given)):
        if followed:
            describe_plain(call, watch.origin(given["query"]), watch.origin(given["key"]))
        return call, lambda x: x
    return _arranged(watch, given, call)


def _plain(watch: Follower, given: dict[str, Any]) -> bool:
    """B H T D as it stands: no copies made for grouped queries, no heads packed into the rows of a query."""
    for name in ("key", "value"):
        layout = watch.origin(given[name]).layout()
        if len(layout) == 4 and any(a.repeated for a in layout[1]):
            return False
    return _rows_are_queries(watch, given["query"]) and not _heads_lie_elsewhere(watch, given)


def _heads_lie_elsewhere(watch: Follower, given: dict[str, Any]) -> bool:
    """Whether heads are known to lie elsewhere than along the second axis of four: they come first, all or some of
    them, or something else lies there.

    The kernel calls its axes batch and heads, and does the same with both: who gives it heads first, or sequences or
    windows of a single head, gets the right output. Keys tell of heads where queries are learned as they are.
    """
    for name in ("query", "key"):
        first, second, _, width = watch.origin(given[name]).layout()
        if not width or any(a.birth != "feature" for a in width):
            continue
        if any(map(HeadTest(width), first)):
            return True
        if name == "query" and second and all(a.birth == "data" and a.role is None for a in second):
            return True
    return False


def _rows_are_queries(watch: Follower, query: Tensor) -> bool:
    """Whether the rows of a B H T D query are positions alone, with no heads packed into them."""
    layout = watch.origin(query).layout()
    if len(layout) != 4:
        return False
    widths = {p for a in layout[3] for p in a.lineage()}
    return not any(a.role == "H" or any(p in widths for p in a.lineage()) for a in layout[2])


def _arranged(
    watch: Follower, given: dict[str, Any], call: KernelCall
) -> tuple[KernelCall, Callable[[Tensor], Tensor]]:
    """Heads folded into the batch or the queries, more batch dimensions, repeated keys: told apart by their history."""
    q, k, v, kernels_own = call.q, call.k, call.v, call.output
    n = q.dim()
    if k.dim() != n or v.dim() != n:
        raise LayoutError(f"q, k, v of {n}, {k.dim()} and {v.dim()} dimensions")
    origins = {x: watch.origin(given[x]) for x in ("query", "key", "value")}
    first_is_batch = n == 4 and not _heads_lie_elsewhere(watch, given)
    if first_is_batch:
        origins = {x: _known(origin, given[x]) for x, origin in origins.items()}
    # With enable_gqa the kernel groups by itself: the groups become a dimension of their own, so that q and k have the
    # same dimensions below.
    if given["enable_gqa"] and n > 2 and k.shape[-3] != q.shape[-3]:
        groups = k.shape[-3]
        q = _split_heads(q, groups)
        k, v = k.unsqueeze(-3), v.unsqueeze(-3)
        origins = {
            x: Origin(t.shape, axis_history.reshape, origins[x]) for x, t in (("query", q), ("key", k), ("value", v))
        }
        for name in ("output", "undropped", "bias", "mask"):
            x = getattr(call, name)
            if x is not None and x.dim() > 2:
                setattr(call, name, _split_heads(x, groups) if x.shape[-3] != 1 else x.unsqueeze(-3))
        n += 1
        grouped = partial(_split_heads, groups=groups)
    else:
        grouped = None
    batch = list(range(n - 2))
    labels = ProductLabels([*batch, "t", "d"], [*batch, "s", "d"], [*batch, "t", "s"])
    product = Product(q, k, labels, origins["query"], origins["key"])
    extents = [max(a, b) for a, b in zip(q.shape[:-2], k.shape[:-2], strict=True)]
    layout = shown(product.layout((*extents, q.shape[-2], k.shape[-2])))
    roles = Roles(product, layout[-1])
    if not layout[-1]:
        roles.keys = "b"
    if call.q.dim() == 4 and roles.guessed:
        first_is_batch = True
    if not first_is_batch:  # what is not known to be heads is batch, by the kernel's own word
        call.basis = {x: "kernel" if x in "TS" or x in roles.guessed else "followed" for x in "BHTSG"}
        learned = [a for a in layout[-2] if product.axes[a].source.birth == "parameter"]
        if roles.guessed and len(learned) > 1:  # rows that are several axes of a parameter: heads among them, perhaps
            call.basis |= dict.fromkeys("HTG", "guessed")
    if first_is_batch:
        roles.heads = {a for a in roles.heads if a not in layout[0]} | {a for dim in layout[1:-2] for a in dim}
    call.q = arrange(q, product.operand_factors("a", roles), "BHTD")
    call.k = arrange(k, product.operand_factors("b", roles), "BHSD", group=True)
    call.v = arrange(v, _value_factors(v, origins["value"], layout, roles), "BHSD", group=True)
    groups = max(call.k.shape[1], call.v.shape[1])
    call.k, call.v = (
        x if x.shape[1] == groups else x.repeat_interleave(groups // x.shape[1], 1) for x in (call.k, call.v)
    )
    call.k, call.v = (x.expand(call.q.shape[0], -1, -1, -1) for x in (call.k, call.v))
    describe_product(call, product, roles)
    rows = roles.factors(layout[:-1])
    assert call.output is not None
    of_output = arrangement(call.output.shape, [*rows, [Factor(call.output.shape[-1], "D")]], "BHTD")
    if call.result is kernels_own:
        call.result_form = of_output if grouped is None else lambda x: of_output(grouped(x))
    back = partial(of_output.back, shape=tuple(call.output.shape))
    call.output = of_output(call.output)
    if call.undropped is not None:
        call.undropped = of_output(call.undropped)
    for name in ("bias", "mask"):
        x = getattr(call, name)
        if x is not None:
            x = x.reshape((1,) * (len(layout) - x.dim()) + tuple(x.shape))
            setattr(call, name, arrange(x, roles.factors(layout, x.shape), "BHTS", broadcast=True))
    return call, back


def _split_heads(x: Tensor, groups: int) -> Tensor:
    return x.reshape(*x.shape[:-3], groups, x.shape[-3] // groups, *x.shape[-2:])


def _known(origin: Origin, x: Tensor) -> Origin:
    """The history of an operand of four dimensions: the first two are batch and heads, by the kernel's own word."""
    layout = origin.layout()
    if not any(a.role or a.repeated or a.parent for dim in layout for a in dim):
        return seeded(x.shape, ("B", "H", None, None))
    return origin


def _value_factors(v: Tensor, origin: Origin, layout: Layout, roles: Roles) -> list[list[Factor]]:
    """``v`` has the batch axes of the scores, the keys, and its own width."""
    own, out = origin.layout(), []
    for i, extent in enumerate(v.shape[:-2]):
        pairs = refine(layout[i], own[i]) if extent != 1 and len(own) == v.dim() else None
        atoms = [(a, o.repeated) for a, o in pairs] if pairs else [(a, False) for a in layout[i]]
        out.append([roles.factor(a, broadcast=extent == 1, repeated=r) for a, r in atoms])
    return [*out, [Factor(v.shape[-2], "S")], [Factor(v.shape[-1], "D")]]


_CHOSEN = (
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)
# Whose last query stands at the last key where it is causal; that of the others' first query at the first key.
_FROM_THE_END = frozenset({"_scaled_dot_product_flash_attention"})
# What those are made of: B T H D, packed sequences, and a mask by number.
_BELOW = (
    "_cudnn_attention_forward",
    "_efficient_attention_forward",
    "_flash_attention_forward",
    "_flash_attention_forward_no_dropout_inplace",
    "_triton_multi_head_attention",
    "_triton_scaled_dot_attention",
)
_KERNELS: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": handle,
    **{name: partial(handle_chosen, name) for name in _CHOSEN},
    **{name: partial(handle_unread, name) for name in _BELOW},
}

TAP = Tap("sdpa", kernels=_KERNELS)
