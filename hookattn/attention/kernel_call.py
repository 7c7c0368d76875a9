"""What a tap hands over: one attention call with its kernel's real arguments, in the layout of the contract."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .masks import Diagonal

FIELDS = ("q", "k", "v", "bias", "scores", "mask", "sinks", "weights", "output")


@dataclass(slots=True)
class KernelCall:
    """One attention call as its tap saw it; nothing in it is selected, copied or derived yet.

    Attributes:
        q: B H T D, as it enters the dot product.
        k: B G S D, never repeated for grouped queries.
        v: B G S E.
        output: B H T E, what the model's own kernel returned.
        scale: the kernel's own factor; a tensor (broadcastable to B H T S) where it is learned per head.
        tap: the name of the tap.
        bias: finite additive terms, broadcastable to B H T S.
        mask: bool, broadcastable to B H T S, True = may attend.
        causal: whether the kernel itself hid later keys, beside ``mask``; for a tap to say, read as :attr:`diagonal`.
        offset: where the causal diagonal starts (see :func:`hookattn.attention.causal_mask`); likewise.
        window: the kernel's own sliding window in keys; likewise.
        softcap: ``c`` of ``c·tanh(s/c)``.
        sinks: H, or broadcastable to B H T 1.
        scores: the model's own finite scores, B H T S, where it formed them.
        weights: the model's own weights before dropout, B H T S, where it formed them.
        applied: what the model really multiplied with ``v`` where that is not ``weights`` (dropout, head mixing).
        dropout: probability of dropout between softmax and ``v``.
        undropped: what the same kernel returns with dropout off, where the weights are not formed.
        mixed: the model changed the weights after the softmax, beyond dropout (heads mixed, renormalised).
        softmax_dtype: the dtype the softmax ran in, where it is known and may differ from that of ``q``.
        opaque: ``scores`` are the model's own and are more than scale, soft-cap and bias of q·k.
        outer_error: where the kernel never hands out ``output``: the measured distance of something further out.
        module: the module that the kernel itself was told it runs in.
        path: the module around all that the call is made of, where its parts ran in several; None: the running one.
        within: the child of the running module that the call belongs to, where a fused layer hides it.
        notes: what a reader has to know.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor | None
    scale: float | Tensor
    tap: str
    bias: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    offset: int = 0
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    scores: Tensor | None = None
    weights: Tensor | None = None
    applied: Tensor | None = None
    dropout: float = 0.0
    undropped: Tensor | None = None
    opaque: bool = False
    mixed: bool = False
    softmax_dtype: torch.dtype | None = None
    outer_error: Tensor | None = None
    module: nn.Module | None = None
    path: str | None = None
    within: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def diagonal(self) -> Diagonal:
        """What the kernel hides by itself, beside ``mask``."""
        return Diagonal(self.causal, self.offset, self.window)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the kernel ran in."""
        return self.q.dtype
