"""Some entries of a tensor, by their places along its axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def exchanged(x: Tensor, places: Sequence[Sequence[int] | None], new: Tensor) -> Tensor:
    """A copy of a tensor with some entries exchanged; all others keep their bits, and where gradients go.

    Args:
        x: the tensor.
        places: along its first axes; None: all of an axis.
        new: broadcastable to these entries.
    """
    every = list(places)
    while every and every[-1] is None:  # what is whole at the end needs no index
        every.pop()
    out = x.clone()
    index = [torch.arange(n) if p is None else torch.tensor(p) for n, p in zip(x.shape, every, strict=False)]
    at = torch.meshgrid(*(i.to(x.device) for i in index), indexing="ij") if index else ()
    out[at] = new.to(x.dtype)
    return out
