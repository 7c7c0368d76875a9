"""Plain calls of one shape, measured at once.

A small model spends more time between its kernels than in them: what costs is the number of operations, and N calls
that are stacked take as many as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention.functional import compute_dtype
from ..attention.masks import CompleteMask, additive_mask
from .verification import Maxima


@dataclass(slots=True)
class StackedCalls:
    """N calls that have no bias, sinks, soft-cap, dropout or weights of the model's own; in the dtype they are derived
    in.

    Attributes:
        q: N·B H T D.
        k: N·B G S D.
        v: N·B G S E.
        output: N·B H T E.
        n: how many calls.
        scale: the kernels' own.
        mask: bool, broadcastable to B H T S, of every call; None where nothing is hidden.
        additive: the same as 0 and −∞; None if nobody has made it yet.
        empty: whether the mask has rows with nothing to attend to.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor
    n: int
    scale: float
    mask: Tensor | None
    additive: Tensor | None
    empty: bool

    @classmethod
    def of(cls, several: Sequence[Sequence[Tensor]], masked: CompleteMask, scale: float) -> StackedCalls:
        """From q, k, v and output of each call, and what they have in common."""
        # One call needs no copy.
        parts = [torch.cat(same) for same in zip(*several, strict=True)] if len(several) > 1 else several[0]
        wide = compute_dtype(parts[0].dtype)
        if parts[0].dtype != wide:
            parts = [x.to(wide) for x in parts]
        q, k, v, output = parts
        return cls(q, k, v, output, len(several), scale, masked.real, masked.hidden, masked.empty)

    def of_rows(self, rows: slice) -> StackedCalls:
        """Some query rows of the calls."""
        if rows == slice(0, self.q.shape[2], 1):
            return self
        mask, additive = (x if x is None or x.shape[2] == 1 else x[:, :, rows] for x in (self.mask, self.additive))
        return replace(self, q=self.q[:, :, rows], output=self.output[:, :, rows], mask=mask, additive=additive)

    def scores(self) -> Tensor:
        """N B H T S: scale·q·kᵀ."""
        (nb, h, t, d), (g, s) = self.q.shape, self.k.shape[1:3]
        # Query heads that share a key head are rows of one product, so that k is not repeated for them.
        q, k = self.q.reshape(nb * g, -1, d), self.k.reshape(nb * g, s, d)
        product = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=self.scale)
        return product.view(self.n, -1, h, t, s)

    def largest_scores(self, scores: Tensor) -> Tensor:
        """N 1: the largest absolute score that the mask lets through."""
        seen = scores if self.mask is None else torch.where(self.mask, scores, 0.0)
        return seen.abs().view(self.n, -1).amax(1, keepdim=True)

    def weights(self, scores: Tensor, careful: bool) -> Tensor:
        """N B H T S: softmax over S where the mask lets through.

        Args:
            scores: of these calls; may be written to.
            careful: choose scores by the mask; else it is added to them as −∞, which is quicker, and gives NaN where a
                hidden score is +∞.
        """
        masked = scores
        if self.mask is not None and careful:
            masked = torch.where(self.mask, scores, -torch.inf)
        elif self.mask is not None:
            additive = additive_mask(self.mask) if self.additive is None else self.additive
            masked = scores.add_(additive)
        weights = torch.softmax(masked, -1)
        if self.empty and self.mask is not None:
            weights.masked_fill_(~self.mask.any(-1, keepdim=True), 0.0)
        return weights

    def maxima(self, weights: Tensor, largest_scores: Tensor | None) -> Maxima[Tensor]:
        """What the certificates are made of.

        Args:
            weights: of these calls and rows.
            largest_scores: N 1, of :meth:`largest_scores`; None: nothing shall be allowed for them.
        """
        n, (nb, h, t, _), (g, s, e) = self.n, self.q.shape, self.v.shape[1:]
        v = self.v.reshape(nb * g, s, e)
        gap = torch.bmm(weights.reshape(nb * g, -1, s), v).view(n, -1, h, t, e)
        gap, excess = gap.sub_(self.output.reshape(gap.shape)), weights.sum(-1).sub_(1)
        if self.empty and self.mask is not None:
            # A row that sees nothing has no weights that sum to 1, and its output is whatever the kernel likes.
            live = self.mask.any(-1, keepdim=True)
            gap, excess = torch.where(live, gap, 0.0), torch.where(live[..., 0], excess, 0.0)
        return Maxima(
            row_sums=excess.abs_().view(n, -1).amax(1, keepdim=True),
            weights=None,
            scores=largest_scores,
            outputs=gap.abs_().view(n, nb // n * h, -1).amax(2),
            values=v.abs().reshape(n, nb // n * g, -1).amax(2),
        )
