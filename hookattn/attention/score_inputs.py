"""What statistics are computed of: one attention call, with what hides keys kept apart as the kernel had it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .functional import sink_column, with_four_axes
from .kernel_call import KernelCall
from .masks import Diagonal


@dataclass(slots=True)
class ScoreInputs:
    """One attention call, restricted to what is kept.

    Attributes:
        q: B H T D.
        k: B G S D.
        scale: a float, or a tensor broadcastable to B H T S.
        softcap: ``c`` of ``c·tanh(s/c)``.
        bias: broadcastable to B H T S.
        mask: bool, broadcastable to B H T S, what the kernel was given; what it hides by itself is not in it.
        sinks: H, or broadcastable to B H T 1.
        scores: the model's own, B H T S, where it formed them: then nothing above but mask and sinks counts.
        causal: whether the kernel hides later keys; read as :attr:`diagonal`.
        offset: where its diagonal starts; likewise.
        window: its sliding window; likewise.
        rows: T, which queries of the whole call these are.
        positions: (B or 1) T, the key position that each is at; None where there is no such thing.
        notes: gets a line where a GPU's kernels do not take it.
    """

    q: Tensor
    k: Tensor
    scale: float | Tensor = 1.0
    softcap: float | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    sinks: Tensor | None = None
    scores: Tensor | None = None
    causal: bool = False
    offset: int = 0
    window: int | None = None
    rows: Tensor | None = None
    positions: Tensor | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of_weights(cls, weights: Tensor, positions: Tensor | None) -> ScoreInputs:
        """Of weights alone, and of those that are a distribution without being a softmax.

        Scores are their logarithms, and what rows lack of 1 is a sink: the softmax of these is the weights again, and
        every statistic but the log-sum-exp and the largest score is the same (these two are up to the same constant).

        Args:
            weights: B H T S, none negative, no row sums to more than 1.
            positions: as in the attributes.
        """
        wide = weights if weights.dtype == torch.float64 else weights.float()
        # float16 and bfloat16 weights are rounded one by one, so that a row of them sums to 1 only so far.
        slack = 1e-4 if weights.dtype in (torch.float32, torch.float64) else 0.03
        rest = 1 - wide.sum(-1, keepdim=True)
        lacking = wide.any(-1, keepdim=True) & (rest > slack)
        sinks = torch.where(lacking, rest, 0.0).log() if bool(lacking.any()) else None
        return cls.of_scores(wide.log(), wide != 0, sinks, positions)  # a NaN is to be seen

    @classmethod
    def of_scores(
        cls, scores: Tensor, mask: Tensor | None, sinks: Tensor | None, positions: Tensor | None
    ) -> ScoreInputs:
        """Of scores, B H T S, which are made of nothing else; the rest as in the attributes."""
        b, h, t, s = scores.shape
        return cls(
            scores.new_empty(b, h, t, 0),
            scores.new_empty(b, h, s, 0),
            mask=mask,
            sinks=sinks,
            scores=scores,
            positions=positions,
        )

    @property
    def diagonal(self) -> Diagonal:
        """What the kernel hides by itself, beside ``mask``."""
        return Diagonal(self.causal, self.offset, self.window)

    @classmethod
    def of(cls, call: KernelCall, rows: Tensor | None, positions: Tensor | None) -> ScoreInputs:
        """Of a call as its tap saw it, restricted; without q and k, of one that has scores of its own."""
        q, k, scores = call.q, call.k, call.scores
        if not call.is_product and scores is not None:
            # What is scored by itself needs vectors for their extents alone: one number stands for all.
            one = scores.new_zeros(1, 1, 1, 1)
            q, k = one.expand(*scores.shape[:3], 1), one.expand(*call.v.shape[:3], 1)
        return cls(
            q,
            k,
            call.scale if call.is_product else 1.0,
            call.softcap,
            with_four_axes(call.bias),
            with_four_axes(call.mask),
            None if call.sinks is None else sink_column(call.sinks),
            scores,
            rows=rows,
            positions=positions,
            notes=call.notes,
            **call.diagonal._asdict(),
        )
