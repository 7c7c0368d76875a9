"""What the gradient of a kernel's output says of its weights, scores, queries, keys and values. Pure functions.

With ``O = A·V``, the chain rule needs neither the kernel's own backward nor any matrix that it did not keep (Dao et al.
2022, FlashAttention, appendix B.2). Letters as in :mod:`hookattn.attention`; ``dX`` is the gradient of a scalar with
respect to X, in float32, or in float64 of tensors in that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .functional import compute_dtype, dot_scores, weighted_values
from .normalizers import normalizer_of


def applied_gradient(of_output: Tensor, v: Tensor) -> Tensor:
    """``dA = dO·vᵀ``, of the weights as they met the values: B H T E, B G S E -> B H T S."""
    return dot_scores(of_output, v)


def undropped_gradient(of_applied: Tensor, applied: Tensor, dropout: float) -> Tensor:
    """The gradient of weights before dropout: that of what met the values, where dropout let it pass, over ``1 − p``.

    Args:
        of_applied: B H T S.
        applied: B H T S, what met the values: 0 where it was dropped. Where a weight is 0 itself nobody can tell, and
            what stands here is 0.
        dropout: p.
    """
    return torch.where(applied != 0, of_applied / (1 - dropout), 0.0) if dropout < 1 else torch.zeros_like(of_applied)


def scores_gradient(
    normalizer: str, weights: Tensor, of_weights: Tensor, scores: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """The gradient of scores, B H T S: that of the weights through the normalizer that made them; 0 where masked.

    Of a softmax, ``dS = W ∘ (dW − Σ_s dW ∘ W)``. Sinks change nothing in that: ``∂w_i/∂s_j = w_i·(δ_ij − w_j)`` holds
    for any further term of the denominator, and then W does not sum to 1.

    Args:
        normalizer: its name.
        weights: B H T S, as it made them.
        of_weights: B H T S.
        scores: B H T S, which some normalizers ask for; None: they are not known.
        mask: bool, broadcastable to B H T S, True = may attend; None: all may.

    Returns:
        None where nobody knows the normalizer's derivative, or where it needs the scores and there are none.
    """
    known = normalizer_of(normalizer)
    weights = weights.to(of_weights.dtype)
    if known.back is not None:
        found = known.back(weights, of_weights)
    elif known.slope is not None and scores is not None:
        found = of_weights * known.slope(scores.to(of_weights.dtype))
    else:
        return None
    return found if mask is None else torch.where(mask, found, 0.0)


def uncapped_gradient(of_scores: Tensor, raw: Tensor, softcap: float) -> Tensor:
    """Through a soft-cap ``c·tanh(x/c)``: times ``1 − tanh²(x/c)``; ``raw``: B H T S, scale·q·kᵀ."""
    return of_scores * (1 - torch.tanh(raw / softcap).square())


def queries_gradient(of_raw: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
    """``dq = scale·dS·k``: B H T S, B G S D -> B H T D; ``scale``: broadcastable to B H T S."""
    return weighted_values(of_raw * scale, k)


def keys_gradient(of_raw: Tensor, q: Tensor, scale: float | Tensor, groups: int) -> Tensor:
    """``dk = scale·dSᵀ·q``, summed over the query heads of each key head: B H T S, B H T D -> B G S D."""
    return _over_queries(of_raw * scale, q, groups)


def values_gradient(applied: Tensor, of_output: Tensor, groups: int) -> Tensor:
    """``dv = Aᵀ·dO``, summed over the query heads of each value head: B H T S, B H T E -> B G S E."""
    return _over_queries(applied, of_output, groups)


def _over_queries(pairs: Tensor, x: Tensor, groups: int) -> Tensor:
    dtype = compute_dtype(x.dtype)
    b, h, t, s = pairs.shape
    # The query heads of one key head are further rows of one product.
    rows, width = h // groups * t, x.shape[3]
    pairs, x = pairs.to(dtype).reshape(b * groups, rows, s), x.to(dtype).reshape(b * groups, rows, width)
    return torch.bmm(pairs.transpose(1, 2), x).view(b, groups, s, width)
