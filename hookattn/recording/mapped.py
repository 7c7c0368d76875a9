"""Calls inside ``torch.vmap``: the examples that a tensor stands for, as entries of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..attention.kernel_call import TENSOR_SPECS, KernelCall
from ..torch_internals.transforms import examples

Split = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]


def examples_as_batch(call: KernelCall, split: Split) -> KernelCall | None:
    """A call of several examples at once as one call, those of the outermost ``vmap`` first and the batch innermost.

    Args:
        call: its ``bias`` may have the mask in it still: what is added cannot be looked at where it stands for several.
        split: makes bias and mask of it.

    Returns:
        The call with plain tensors; None where they have no values to tell.
    """
    named = {name: x for name in (*TENSOR_SPECS, "outer_error") if isinstance(x := getattr(call, name), Tensor)}
    batch = call.shape[0]
    found = examples(named)
    if found is None:
        return None
    tensors, counts = found
    changes: dict[str, Any] = {name: _merged(name, x, counts, batch) for name, x in tensors.items()}
    made = replace(call, **changes, notes=list(call.notes))
    if made.bias is not None:
        made.bias, mask = split(made.bias)
        if mask is not None:
            made.mask = mask if made.mask is None else made.mask & mask
    many = " x ".join(map(str, counts))
    made.notes.append(
        f"inside torch.vmap: the batch is {many} examples of {batch} {'entry' if batch == 1 else 'entries'}"
    )
    return made


def _merged(name: str, x: Tensor, counts: tuple[int, ...], batch: int) -> Tensor:
    n = len(counts)
    if name == "outer_error":
        return x.amax()
    spec = TENSOR_SPECS[name]
    own = x.shape[n:]
    if spec.broadcast:
        if math.prod(x.shape[:n]) == 1:  # the same for all
            return x.reshape(own)
        # As broad as B H T S; of sinks, the one axis there may be is the heads'.
        full = (1, own[0], 1, 1) if spec.is_column and len(own) == 1 else (*(1,) * (4 - len(own)), *own)
        x = x.reshape(*x.shape[:n], *full)
    x = x.expand(*counts, batch, *x.shape[n + 1 :])
    return torch.flatten(x, 0, n)
