"""The complete mask of a call: what the kernel was given, and what it hides by itself."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..torch_internals.tensor_memo import TensorMemo

# Masks of up to this many entries that depend on nothing but a shape are made once for all traces.
_SMALL = 1 << 16


class CompleteMask(NamedTuple):
    """The complete mask of a call, and what it does.

    Attributes:
        mask: bool, broadcastable to B H T S; for the call, and nobody else's.
        real: the same values, never written to; None if nothing is hidden.
        empty: whether it has rows with nothing to attend to.
        hidden: 0 where it is True and −∞ elsewhere, float32; None if nobody has made it yet.
    """

    mask: Tensor
    real: Tensor | None
    empty: bool
    hidden: Tensor | None = None


class CompleteMasks:
    """The complete masks of calls: one for all layers that are given the same.

    Args:
        once: remembers them.
    """

    def __init__(self, once: TensorMemo):
        self._once = once

    def __call__(
        self,
        own: Tensor | None,
        t: int,
        s: int,
        offset: int,
        window: int | None,
        causal: bool,
        device: torch.device,
    ) -> CompleteMask:
        """As :func:`complete_mask`, whatever the dtype of ``own``."""
        if own is not None and own.dtype != torch.bool:
            own = own.bool()
        shape = t, s, offset, window, causal, device
        return self._once(shape, own, lambda: complete_mask(own, *shape))  # type: ignore[no-any-return]


def complete_mask(
    own: Tensor | None, t: int, s: int, offset: int, window: int | None, causal: bool, device: torch.device
) -> CompleteMask:
    """The complete mask.

    Args:
        own: bool, broadcastable to B H T S, what the kernel was given; or None.
        t, s, offset, window, causal, device: see :func:`hookattn.attention.causal_mask`.
    """
    if not causal and window is None:
        if own is None:
            return CompleteMask(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), None, False)
        mask = own.clone(memory_format=torch.contiguous_format)
    elif own is None and t * s <= _SMALL:
        known = _by_shape(t, s, offset, window, causal, device)
        return known._replace(mask=known.mask.clone())
    else:
        mask = causal_mask(t, s, window=window, offset=offset, causal=causal, device=device)
        mask = mask if own is None else own & mask
    if mask.numel() == 1 and bool(mask):
        return CompleteMask(mask, None, False)
    return CompleteMask(mask, mask, _leaves_empty(mask))


@functools.lru_cache(maxsize=64)
def _by_shape(t: int, s: int, offset: int, window: int | None, causal: bool, device: torch.device) -> CompleteMask:
    with torch.inference_mode(False), torch.no_grad():
        mask = causal_mask(t, s, window=window, offset=offset, causal=causal, device=device).contiguous()
        return CompleteMask(mask, mask, _leaves_empty(mask), additive_mask(mask))


def additive_mask(mask: Tensor) -> Tensor:
    """0 where a mask is True and −∞ elsewhere, float32."""
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, -torch.inf)


def _leaves_empty(mask: Tensor) -> bool:
    return not bool(mask.any(-1).all())


# An additive entry at or below this is a mask, unless the tensor slopes down to it gradually (a long ALiBi bias).
MASKED = -9_000.0


# The smallest penalty in use as a mask: Swin's 0/-100, whose weights do reach 0.
FILL = -99.0


# What masks are made of beside -10000: float16's lowest, -1e9, the lowest of the others. A mask stands apart from the
# bias by at least a third of its size.
_BOUNDS = (MASKED, -60_000.0, -5e8, -1e30)


_APART = 1.5


def causal_mask(
    t: int,
    s: int,
    *,
    window: int | None = None,
    offset: int = 0,
    causal: bool = True,
    device: torch.device | None = None,
) -> Tensor:
    """The bool mask of a causal or windowed kernel: 1 1 T S, True = may attend.

    Args:
        t: queries.
        s: keys.
        window: how many keys up to and including the query's own position it may see; None: no limit.
        offset: 0 aligns query 0 with key 0 (torch); ``s - t`` aligns the last query with the last key (flash-attn).
        causal: whether later keys are hidden; without it the window is two-sided.
        device: where the mask is made.
    """
    distance = torch.arange(t, device=device).view(t, 1) + offset - torch.arange(s, device=device)
    keep = distance >= 0 if causal else torch.ones((), dtype=torch.bool, device=device).expand(t, s)
    if window is not None:
        keep = keep & (distance < window)
        if not causal:
            keep = keep & (distance > -window)
    return keep.view(1, 1, t, s)


def split_additive(additive: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """An additive mask as (bias, mask): finite terms, and what may be attended to.

    −inf, ``finfo.min``, −10000 and their kin are masks, also where a bias was summed into the same tensor; so is a
    tensor that holds nothing but 0 and penalties of −99 or less (Swin's −100). A bias that slopes down gradually
    (ALiBi over a long context) stays a bias.

    Args:
        additive: floating, any shape.

    Returns:
        bias (finite, zero where masked; None if it is zero everywhere) and mask (bool; None if nothing is masked).
    """
    if additive.numel() == 0:
        return None, None
    low, top = (x.item() for x in torch.aminmax(additive))
    if low == 0 and top == 0:
        return None, None
    if low > FILL:
        return additive, None
    hidden, bias, floor = None, additive, low
    for bound in (b for b in _BOUNDS if low <= b):
        below = additive <= bound
        rest = torch.where(below, 0.0, additive)
        least, most = (x.item() for x in torch.aminmax(rest))
        if least > bound / _APART:  # no slope that leads down to it
            hidden, bias, floor, top = below, rest, least, most
            break
    if floor <= FILL and top == 0 and not bool(((bias < 0) & (bias > FILL)).any()):
        hidden, floor = additive != 0, 0.0
    return None if floor == 0 and top == 0 else bias, None if hidden is None else ~hidden


def hidden(rows: Tensor, keys: slice, causal: bool, window: int | None) -> Tensor:
    """R n: what a causal or windowed kernel hides of some keys from queries on the diagonal at ``rows``."""
    distance = rows.unsqueeze(-1) - torch.arange(keys.start, keys.stop, device=rows.device)
    if not causal:
        assert window is not None
        return distance.abs_() >= window
    return distance < 0 if window is None else (distance < 0) | (distance >= window)
