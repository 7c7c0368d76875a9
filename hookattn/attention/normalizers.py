"""What makes weights of scores: the softmax, and what models have in its place. All that is known of each stands here.

A call names its normalizer. Where this table has the name, weights can be computed again from scores, and are held
against the model's own; where it has not (``entmax``, a function of somebody's own) the weights are what the model
formed, and nothing else is known of them.

Letters: B batch, H query heads, T queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .functional import softmax_weights

SOFTMAX = "softmax"
OF_ONE = "softmax1"


class Normalizer(NamedTuple):
    """What is known of one normalizer.

    Attributes:
        of_each: the weight of a score alone, B H T S -> B H T S, where it depends on no other; a hidden key weighs 0.
        of_rows: the weights of rows of scores, B H T S with −∞ where a key is hidden -> B H T S.
        sums_to_one: whether the weights of a row that sees any key sum to 1 (with sinks: to 1 at most).
        slope: the derivative of ``of_each``, B H T S -> B H T S.
        back: of ``of_rows``: the weights and their gradient, B H T S each -> that of the scores, B H T S.
    """

    of_each: Callable[[Tensor], Tensor] | None = None
    of_rows: Callable[[Tensor], Tensor] | None = None
    sums_to_one: bool = False
    slope: Callable[[Tensor], Tensor] | None = None
    back: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def known(self) -> bool:
        """Whether weights can be computed of scores."""
        return self.of_each is not None or self.of_rows is not None


def _sparsemax(scores: Tensor) -> Tensor:
    """The nearest point of the simplex (Martins and Astudillo 2016)."""
    # Hidden keys are far below all others, and so are never in the support. NaN and rows without keys stay NaN.
    lowest = torch.finfo(scores.dtype).min
    z = (scores - scores.amax(-1, keepdim=True)).nan_to_num(nan=torch.nan, neginf=lowest)
    order = z.sort(-1, descending=True).values
    counts = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    # Of what is left of −1 nothing is in the support, and its sum may overflow.
    sums = order.clamp_min(-2.0).cumsum(-1) - 1
    size = (order * counts > sums).sum(-1, keepdim=True).clamp_min(1)
    threshold = sums.gather(-1, size - 1) / size
    return (z - threshold).clamp_min(0)


def _softmax_back(weights: Tensor, of_weights: Tensor) -> Tensor:
    """``W ∘ (dW − Σ dW ∘ W)``, whatever else is in the denominator."""
    return weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))


def _sparsemax_back(weights: Tensor, of_weights: Tensor) -> Tensor:
    """On the support ``dW`` less its mean there, and 0 elsewhere (Martins and Astudillo 2016, section 2.5)."""
    support = weights > 0
    total = torch.where(support, of_weights, 0.0).sum(-1, keepdim=True)
    return torch.where(support, of_weights - total / support.sum(-1, keepdim=True).clamp_min(1), 0.0)


def _sigmoid_slope(scores: Tensor) -> Tensor:
    return torch.sigmoid(scores) * torch.sigmoid(-scores)


NORMALIZERS: dict[str, Normalizer] = {
    # The softmax itself, and one with an extra one in its denominator, which is a sink whose logit is 0.
    SOFTMAX: Normalizer(of_rows=lambda x: torch.softmax(x, -1), sums_to_one=True, back=_softmax_back),
    OF_ONE: Normalizer(of_rows=lambda x: torch.softmax(x, -1), sums_to_one=True, back=_softmax_back),
    "sparsemax": Normalizer(of_rows=_sparsemax, sums_to_one=True, back=_sparsemax_back),
    "sigmoid": Normalizer(of_each=torch.sigmoid, slope=_sigmoid_slope),
    "relu": Normalizer(of_each=torch.relu, slope=lambda x: (x > 0).to(x.dtype)),
    "relu^2": Normalizer(of_each=lambda x: torch.relu(x).square(), slope=lambda x: 2 * torch.relu(x)),
    "exp": Normalizer(of_each=torch.exp, slope=torch.exp),
    "softplus": Normalizer(of_each=torch.nn.functional.softplus, slope=torch.sigmoid),
    "none": Normalizer(of_each=lambda x: x, slope=torch.ones_like),
}
"""By the names that ``call.normalizer`` has. Others are words for what was seen, whose weights alone are known."""
_UNKNOWN = Normalizer()


def normalizer_of(name: str) -> Normalizer:
    """What is known of a normalizer; of one that is not in the table, nothing."""
    return NORMALIZERS.get(name, _UNKNOWN)


def is_softmax(name: str) -> bool:
    """Whether weights are the softmax of scores and sinks: what every reader of a trace can compute by itself."""
    return name in (SOFTMAX, OF_ONE)


def normalized(
    name: str, scores: Tensor, mask: Tensor | None, sinks: Tensor | None = None, empty: bool = True
) -> Tensor | None:
    """The weights that a normalizer makes of scores; None: nobody knows.

    Args:
        name: of the normalizer.
        scores: B H T S, left untouched.
        mask: bool, broadcastable to B H T S, True = may attend; None: all may.
        sinks: H, or broadcastable to B H T 1; of a softmax alone.
        empty: whether ``mask`` may have rows with nothing to attend to; they weigh 0.

    Returns:
        B H T S in the dtype of ``scores``.
    """
    if is_softmax(name):
        if name == OF_ONE and sinks is None:
            sinks = scores.new_zeros(1, 1, 1, 1)
        return softmax_weights(scores, mask, sinks, empty)
    found = normalizer_of(name)
    if found.of_each is not None:
        weights = found.of_each(scores)
        return weights if mask is None else torch.where(mask, weights, 0.0)
    if found.of_rows is not None:
        weights = found.of_rows(scores if mask is None else torch.where(mask, scores, -torch.inf))
        if empty and mask is not None:
            weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
        return weights
    return None
