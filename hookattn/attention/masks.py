"""The complete mask of a call: what the kernel was given, and what it hides by itself."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..torch_internals.tensor_memo import Once
from .functional import causal_mask

# Masks of up to this many entries that depend on nothing but a shape are made once for all traces.
_SMALL = 1 << 16


class Masked(NamedTuple):
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


class Masks:
    """The complete masks of calls: one for all layers that are given the same.

    Args:
        once: remembers them.
    """

    def __init__(self, once: Once):
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
    ) -> Masked:
        """As :func:`complete`, whatever the dtype of ``own``."""
        if own is not None and own.dtype != torch.bool:
            own = own.bool()
        shape = t, s, offset, window, causal, device
        return self._once(shape, own, lambda: complete(own, *shape))  # type: ignore[no-any-return]


def complete(
    own: Tensor | None, t: int, s: int, offset: int, window: int | None, causal: bool, device: torch.device
) -> Masked:
    """The complete mask.

    Args:
        own: bool, broadcastable to B H T S, what the kernel was given; or None.
        t, s, offset, window, causal, device: see :func:`hookattn.attention.causal_mask`.
    """
    if not causal and window is None:
        if own is None:
            return Masked(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), None, False)
        mask = own.clone(memory_format=torch.contiguous_format)
    elif own is None and t * s <= _SMALL:
        known = _by_shape(t, s, offset, window, causal, device)
        return known._replace(mask=known.mask.clone())
    else:
        mask = causal_mask(t, s, window=window, offset=offset, causal=causal, device=device)
        mask = mask if own is None else own & mask
    if mask.numel() == 1 and bool(mask):
        return Masked(mask, None, False)
    return Masked(mask, mask, _leaves_empty(mask))


@functools.lru_cache(maxsize=64)
def _by_shape(t: int, s: int, offset: int, window: int | None, causal: bool, device: torch.device) -> Masked:
    with torch.inference_mode(False), torch.no_grad():
        mask = causal_mask(t, s, window=window, offset=offset, causal=causal, device=device).contiguous()
        return Masked(mask, mask, _leaves_empty(mask), additive(mask))


def additive(mask: Tensor) -> Tensor:
    """0 where a mask is True and −∞ elsewhere, float32."""
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, -torch.inf)


def _leaves_empty(mask: Tensor) -> bool:
    return not bool(mask.any(-1).all())
