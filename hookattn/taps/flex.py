"""``torch.nn.attention.flex_attention``: score_mod and block mask read back as soft-cap, bias and mask."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention.functional import dot_scores
from ..attention.kernel_call import KernelCall
from ..attention.masks import split_additive
from ..torch_internals.code_patching import Patch
from ..torch_internals.isolation import no_gradients
from .active import current
from .base import Tap
from .packed_kernels import first_exchanged

_MODULE = "torch.nn.attention.flex_attention"
_FAR = 1e30
_ENDS = 8  # queries and keys at either end
_OPERANDS = ("query", "key", "value")
# A bias and a mask are a function and a table of blocks to this kernel, which no tensor can be turned into.
_CHANGEABLE = frozenset({"q", "k", "v"})


def body(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the kernel as it is, then report what it was given."""
    tracing = current()
    if tracing is None:
        return original(*args, **kwargs)
    names = ("query", "key", "value", "score_mod", "block_mask", "scale", "enable_gqa", "return_lse")
    given = {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}
    understand = guess_score_mod if tracing.shapes_only else apply_score_mod
    instead = None
    # Who listens may want a gradient of what the call is made of; else nobody does.
    reading = nullcontext if tracing.listened else partial(no_gradients, but=tracing.attached)
    with tracing.kernel(True):
        asked = None
        if tracing.listened:
            asked = read(given, None, understand)
            change = tracing.before(asked, _CHANGEABLE)
            for name, x in zip(_OPERANDS, (change.q, change.k, change.v) if change else (None,) * 3, strict=True):
                given[name] = given[name] if x is None else x
            args = (*(given[name] for name in _OPERANDS), *args[3:])
            kwargs = {name: x for name, x in kwargs.items() if name not in _OPERANDS}
        out = shaped(given) if tracing.shapes_only else original(*args, **kwargs)
        with reading():
            call = read(given, out[0] if isinstance(out, tuple) else out, understand)
        if asked is not None:
            call.edits = asked.edits
            instead = tracing.after(call)
        with no_gradients(but=tracing.attached):
            tracing.record(call)
    if instead is None:
        return out
    return first_exchanged(out, instead)


def shaped(given: dict[str, Any]) -> Any:
    """What the kernel would return for arguments without values, which it does not take."""
    q, v, aux = given["query"], given["value"], given.get("return_aux")
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    if aux is None:
        return (out, lse) if given["return_lse"] else out
    flex = importlib.import_module(_MODULE)
    return out, flex.AuxOutput(lse if aux.lse else None, lse if aux.max_scores else None)


def read(given: dict[str, Any], out: Tensor | None, understand: Callable[..., None]) -> KernelCall:
    """One call of the kernel in the contract's layout; ``understand`` says what a score_mod does to it."""
    q, k, v = given["query"], given["key"], given["value"]
    scale = given["scale"]
    call = KernelCall(
        q=q,
        k=k,
        v=v,
        output=out,
        tap="flex_attention",
        scale=float(scale) if scale is not None else q.shape[-1] ** -0.5,
        result=out,
    )
    call.mask = block_mask_dense(given["block_mask"], q, k)
    if given["score_mod"] is not None:
        understand(call, given["score_mod"])
    return call


def block_mask_dense(block_mask: Any, q: Tensor, k: Tensor) -> Tensor | None:
    """A BlockMask as a bool mask broadcastable to B H T S; None where everything may be attended to."""
    if block_mask is None:
        return None
    flex = importlib.import_module(_MODULE)
    b, h = block_mask.shape[:2]
    t, s = q.shape[2], k.shape[2]
    mask: Tensor = flex.create_mask(block_mask.mask_mod, b, h, t, s, q.device)
    blocks = block_mask.to_dense().bool()
    rows, columns = block_mask.BLOCK_SIZE
    if block_mask.mask_mod is flex.noop_mask and not bool(blocks.all()):
        mask = blocks.repeat_interleave(rows, -2).repeat_interleave(columns, -1)[..., :t, :s]
    return None if bool(mask.all()) else mask


def evaluate(score_mod: Callable[..., Tensor], scores: Tensor) -> Tensor:
    """``score_mod`` on every entry, vectorised as the kernel does it. ``scores``: B H T S."""
    at = [torch.arange(n, device=scores.device) for n in scores.shape]
    inner = score_mod
    for axes in (
        (0, None, None, None, 0),
        (0, None, None, 0, None),
        (0, None, 0, None, None),
        (0, 0, None, None, None),
    ):
        inner = torch.vmap(inner, in_dims=axes, out_dims=0)
    return inner(scores, *at)


def apply_score_mod(call: KernelCall, score_mod: Callable[..., Tensor]) -> None:
    """Say what a score_mod does in the words of the contract: a soft-cap, a bias, a mask; else its own values."""
    plain = dot_scores(call.q, call.k, call.scale)
    scores = evaluate(score_mod, plain)
    at_zero = evaluate(score_mod, torch.zeros_like(plain))
    bias, mask = split_additive(at_zero)
    keep = torch.ones((), dtype=torch.bool, device=plain.device) if mask is None else mask
    add = torch.zeros((), device=plain.device) if bias is None else bias
    cap: float | None = None
    rebuilt = plain + add
    if not _agree(rebuilt, scores, keep):
        high, low = (evaluate(score_mod, torch.full_like(plain, far)) for far in (_FAR, -_FAR))
        half = torch.where(keep, (high - low) / 2, 0.0)
        cap = float(half.detach().amax())
        if 0 < cap < 1e20 and bool(torch.where(keep, (half - cap).abs() <= 1e-4 * cap, True).all()):
            rebuilt = cap * torch.tanh(plain / cap) + add
        if not (cap > 0 and _agree(rebuilt, scores, keep)):
            cap = None
            call.opaque = True
            call.scores = torch.where(keep & scores.isfinite(), scores, plain)
            call.notes.append("scores are score_mod's own values: it is no soft-cap and no bias")
            bias = None
            mask = scores.isfinite() if mask is None else mask & scores.isfinite()
    call.softcap, call.bias = cap, _narrow(bias)
    if mask is not None and not bool(mask.all()):
        mask = _narrow(mask)
        call.mask = mask if call.mask is None or mask is None else call.mask & mask


def guess_score_mod(call: KernelCall, score_mod: Callable[..., Tensor]) -> None:
    """The same of a call without values: what the score_mod makes of others at either end, in full extent."""
    (b, h, t, d), (g, s), device = call.q.shape, call.k.shape[1:3], call.q.device
    rows, keys = (torch.arange(n, device=device) for n in (t, s))
    rows, keys = (x if len(x) <= 2 * _ENDS else torch.cat([x[:_ENDS], x[-_ENDS:]]) for x in (rows, keys))
    q, k = (torch.arange(b * n * len(x) * d, device=device).view(b, n, -1, d).sin() for n, x in ((h, rows), (g, keys)))
    part = KernelCall(q=q, k=k, v=k, output=None, tap=call.tap, scale=call.scale)
    apply_score_mod(part, lambda score, b, h, i, j: score_mod(score, b, h, rows[i], keys[j]))

    def whole(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        extent = [n if small > 1 else small for small, n in zip(x.shape, (b, h, t, s), strict=True)]
        return call.q.new_empty(extent, dtype=x.dtype)

    call.softcap, call.opaque, call.notes = part.softcap, part.opaque, part.notes
    call.bias, mask = whole(part.bias), whole(part.mask)
    if mask is not None:
        call.mask = mask if call.mask is None else call.mask & mask


def _narrow(x: Tensor | None) -> Tensor | None:
    """Axes along which nothing changes, kept once."""
    if x is None:
        return None
    for dim in (0, 1):
        if x.shape[dim] > 1 and bool((x == x.narrow(dim, 0, 1)).all()):
            x = x.narrow(dim, 0, 1)
    return x.contiguous()


def _agree(a: Tensor, b: Tensor, where: Tensor) -> bool:
    gap = torch.where(where, a - b, 0.0).abs()
    return bool((gap <= 1e-4 * (1 + torch.where(where, b, 0.0).abs())).all())


def patches() -> Iterable[Patch]:
    """The kernel, wherever its name was imported to."""
    yield Patch(importlib.import_module(_MODULE), "flex_attention", body)


TAP = Tap("flex_attention", patches=patches)
