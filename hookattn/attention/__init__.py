"""The mathematics of a record, pure: from a kernel's real arguments to scores, masks and weights. No models, no state.

Letters: B batch, H query heads, G key/value heads (H = G·groups), T queries, S keys, D query/key width, E value width.
"""

from .derivation import derive
from .functional import (
    compute_dtype,
    dot_scores,
    finish_scores,
    softmax_weights,
    weighted_values,
)
from .masks import Diagonal, causal_mask, split_additive

__all__ = [
    "Diagonal",
    "causal_mask",
    "compute_dtype",
    "derive",
    "dot_scores",
    "finish_scores",
    "softmax_weights",
    "split_additive",
    "weighted_values",
]
