"""Gradients on their way to the calls of a trace: hooks on what kernels returned, and what one backward brings.

A hook is on the very tensor that the model goes on with, so that it sees what autograd sums up there. What a backward
brings counts when it has ended well: one that raises on its way (a graph that was freed, say) leaves the trace as it
was.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention.kernel_call import KernelCall
from ..calls.output_gradient import OutputGradient, Passes
from ..torch_internals.frames import inside
from ..torch_internals.isolation import at_the_end, backward_number, isolated
from ..torch_internals.lazy_copies import snapshots
from ..torch_internals.transforms import is_wrapped

_FORWARD = "CheckpointFunction.forward"
# Of backward passes that raised nobody is told; what they brought goes when so many are unfinished.
_UNFINISHED = 4

_INFERENCE = (
    "its forward ran inside torch.inference_mode, where there is no graph; run it outside of that, with gradients on"
)
_REENTRANT = (
    "its forward ran inside torch.utils.checkpoint with use_reentrant=True, whose first run has no graph; use "
    "use_reentrant=False (of transformers: gradient_checkpointing_enable({'use_reentrant': False}))"
)
_NO_GRAPH = (
    "its output has no graph: gradients were off as its forward ran (torch.no_grad), or nothing that it is made of "
    "requires one. Run it with gradients on, and let parameters or inputs require one (x.requires_grad_())"
)
_NO_RESULT = (
    "what its kernel returned is no tensor that the model goes on with (tap {}), as in torch's native fast path; run "
    "the model with gradients on, or with torch.backends.mha.set_fastpath_enabled(False)"
)
_TRANSFORMED = (
    "its forward ran inside a transform of torch.func (vmap, grad), whose tensors stand for others; trace a plain "
    "forward"
)


class Arrivals:
    """Takes the gradients that come to the calls of one trace.

    Args:
        dtype, device: as they are stored; None: as they come.
        copy: whether copies are made at once.
    """

    def __init__(self, dtype: torch.dtype | None, device: torch.device | None, copy: bool):
        self._dtype, self._device, self._copy = dtype, device, copy
        self._passes = Passes()
        # By the backward pass, what it has brought so far; of several, since one may run inside another.
        self._brought: dict[int, list[tuple[OutputGradient, Tensor]]] = {}

    def awaited(
        self, call: KernelCall, heads: Sequence[int] | None, queries: Sequence[int] | slice | None
    ) -> OutputGradient:
        """The gradient of a call's output, which has not come yet.

        Args:
            call: whole, as its tap saw it.
            heads, queries: those that are kept, by their places in the call; None: all.
        """
        made = OutputGradient(why_none=_why_none(call), passes=self._passes)
        if not made.why_none:
            assert call.result is not None
            # Whoever holds no call of it any more wants no gradient: the graph may live longer than the trace.
            hook = partial(self._comes, weakref.ref(made), call.result_form, heads, queries)
            call.result.register_hook(hook)  # type: ignore[no-untyped-call]
        return made

    def _comes(
        self,
        awaiting: weakref.ref[OutputGradient],
        form: Callable[[Tensor], Tensor] | None,
        heads: Sequence[int] | None,
        queries: Sequence[int] | slice | None,
        x: Tensor,
    ) -> None:
        found = awaiting()
        if found is None:
            return
        with isolated(x):
            kept = x if form is None else form(x)
            if heads is not None:
                kept = kept[:, list(heads)]
            if queries is not None:
                kept = kept[:, :, queries if isinstance(queries, slice) else list(queries)]
            dtype, device = self._dtype or kept.dtype, self._device or kept.device
            if dtype != kept.dtype or device != kept.device:
                kept = kept.to(device=device, dtype=dtype)
            else:
                (kept,) = snapshots([kept], [False], self._copy)
        number = backward_number()
        brought = self._brought.get(number)
        if brought is None:
            while len(self._brought) >= _UNFINISHED:
                self._brought.pop(next(iter(self._brought)))
            brought = self._brought[number] = []
            at_the_end(partial(self._has_ended, number))
        brought.append((found, kept))

    def _has_ended(self, number: int) -> None:
        """A backward pass has ended, and did not raise."""
        brought: list[Any] = self._brought.pop(number, [])
        if brought:
            self._passes.count += 1
        for found, x in brought:
            with isolated(x):
                found.add(x)


def _why_none(call: KernelCall) -> str:
    """Why no gradient will come to a call; empty: one can."""
    result = call.result
    if result is None:
        return _NO_RESULT.format(call.tap)
    if is_wrapped(result):
        return _TRANSFORMED
    if result.requires_grad:
        return ""
    if result.is_inference():
        return _INFERENCE
    return _REENTRANT if inside("torch.utils.checkpoint", _FORWARD) else _NO_GRAPH
