"""Why a softmax weighs each key of a query as it does, in one word a key: what the lens draws and ``explain`` lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.normalizers import is_softmax
from ..errors import SelectionError
from .part import Part

ATTENDED, OUTSCORED, DRAINED, HIDDEN, EDITED = "attended", "outscored", "drained", "masked", "edited"


@dataclass(frozen=True)
class Verdicts:
    """What decided the weights of one query of one head.

    - *edited*: an edit has set the weight, whatever the score is;
    - *masked*: the mask hides the key;
    - *attended*: it weighs at least 1/n, n the number of keys that are not masked;
    - *drained*: it weighs less, but would weigh 1/n without what goes to the first key and to learned sinks;
    - *outscored*: it would not either.

    Attributes:
        words: for each of the S keys one of these.
        allowed: n, how many keys are not masked.
        first: what the first key takes of the row, where it takes 1/n or more; else 0.
        learned: what learned sinks take.
    """

    words: Sequence[str]
    allowed: int
    first: float
    learned: float


def check_softmax(part: Part, what: str) -> None:
    """Whether keys outscore each other there at all.

    Raises:
        SelectionError: the weights are no softmax.
    """
    if not is_softmax(part.call.normalizer):
        raise SelectionError(
            f"{what} tells why a softmax makes its weights, and those of {part.title} are none (normalizer "
            f"{part.call.normalizer!r}); hookattn.render.heatmap draws any weights."
        )


def verdicts(part: Part, query: int, weights: Tensor, hidden: Tensor | None) -> Verdicts:
    """A word for each key.

    Args:
        part: of one head.
        query: which of its T queries.
        weights: S, of this query.
        hidden: S, bool, what the mask hides; None: not known, and then nothing.
    """
    allowed = torch.ones_like(weights, dtype=torch.bool) if hidden is None else ~hidden
    n = int(allowed.sum())
    was_set = part.set_weights(query)
    edited = torch.zeros_like(allowed) if was_set is None else was_set[0].broadcast_to(allowed.shape)
    # Equal weights are rounded, and each is its share.
    fair = (1 - 1e-6) / n if n else torch.inf
    learned = max(0.0, 1 - float(weights[allowed].sum())) if n and part.learned_sink(query) is not None else 0.0
    sink = part.first_key
    first = float(weights[sink]) if n > 1 and weights[sink] >= fair else 0.0
    rest = 1 - learned - first
    words = []
    for weight, may, by_edit in zip(weights.tolist(), allowed.tolist(), edited.tolist(), strict=True):
        if by_edit:
            words.append(EDITED)
        elif not may:
            words.append(HIDDEN)
        elif weight >= fair:
            words.append(ATTENDED)
        else:
            words.append(DRAINED if rest > 0 and weight / rest >= fair else OUTSCORED)
    return Verdicts(words, n, first, learned)
