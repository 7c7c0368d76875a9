"""Batches whose entries are of different lengths, each filled up at its end: how long each is, and some of them alone.

Letters as in :mod:`hookattn.attention`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .functional import with_four_axes
from .kernel_call import TENSOR_SPECS, KernelCall
from .masks import Diagonal, complete_mask

Length = tuple[int, int]
"""How many queries, and how many keys."""
FILLED_UP = (
    "the shorter sequences are filled up at the end: filled keys are masked, filled queries have nothing to attend to "
    "and are not checked"
)
"""The note of a call of several lengths."""


def lengths_by_mask(mask: Tensor, b: int, t: int, s: int) -> tuple[Length, ...]:
    """For each batch entry how many of its queries and keys are its own, as far as its mask tells.

    Keys at the end that no query may attend to fill it up, and so do queries at the end that may attend to none. Where
    a sequence attends to itself, without a cache (T = S), a query is filled up where its own key is: such masks hide
    columns alone.

    Args:
        mask: bool, broadcastable to B H T S.
        b, t, s: B, T, S.
    """
    seen = with_four_axes(mask).any(1).expand(b, t, s)
    rows, keys = _lasts(seen.any(2)), _lasts(seen.any(1))
    return tuple((min(r, k) if t == s else r, k) for r, k in zip(rows, keys, strict=True))


def _lasts(real: Tensor) -> list[int]:
    """B n -> for each row how many it has up to the last that is True."""
    n = real.shape[1]
    found: list[int] = (real * torch.arange(1, n + 1, device=real.device)).amax(1).tolist() if n else [0] * len(real)
    return found


def lengths_of(call: KernelCall) -> tuple[Length, ...]:
    """For each batch entry of a kernel's call how many of its queries and keys are its own."""
    if call.lengths is not None:
        return call.lengths
    b, _, t, s = call.shape
    if call.mask is None:
        return ((t, s),) * b
    return lengths_by_mask(complete_mask(call.mask, t, s, call.diagonal, call.device).mask, b, t, s)


def notes_of_entries(notes: Iterable[str], lengths: Sequence[Length]) -> list[str]:
    """Those that hold of some entries of a batch as well."""
    return [note for note in notes if note != FILLED_UP or len(set(lengths)) > 1]


def entries_alone(call: KernelCall, entries: Sequence[int], length: Length) -> KernelCall:
    """A kernel's call with some of its batch entries, as if it had been run with these alone.

    Args:
        call: the call; what it returns has views of its tensors where entries are one behind the other.
        entries: which, at least one.
        length: how many queries and keys are left; those behind fill up.
    """
    t, s = length
    extents = {"T": t, "S": s}
    made = replace(call, result=None, result_form=None)
    for name, spec in TENSOR_SPECS.items():
        x = getattr(call, name)
        if not isinstance(x, Tensor) or x.dim() != 4:
            continue
        if x.shape[0] > 1:
            one = len(entries) == 1
            x = x[entries[0] : entries[0] + 1] if one else x.index_select(0, torch.tensor(entries, device=x.device))
        for dim, letter in enumerate(spec.axes):
            if letter in extents and x.shape[dim] > extents[letter]:
                x = x.narrow(dim, 0, extents[letter])
        setattr(made, name, x)
    made.requests = None if call.requests is None else tuple(call.requests[i] for i in entries)
    made.lengths = None if call.lengths is None else tuple(call.lengths[i] for i in entries)
    made.notes = notes_of_entries(call.notes, made.lengths or [length])
    _say_diagonal(made, t, s)
    return made


def _say_diagonal(call: KernelCall, t: int, s: int) -> None:
    """Say without a mask what is hidden, where a diagonal says it: several lengths took a mask, and one does not."""
    if call.mask is None or not call.causal or call.mask.shape[1] > 1:
        return
    exact = Diagonal(True, s - t, call.window)
    whole = complete_mask(call.mask, t, s, call.diagonal, call.device).mask
    if bool((whole == exact.mask(t, s, call.device)).all()):
        call.mask, call.offset = None, s - t
