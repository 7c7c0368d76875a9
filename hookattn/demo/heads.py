"""What the demo looks for in a trace: heads that do one recognizable thing, with the evidence.

Letters: H heads, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..trace import Call, Trace


@dataclass(frozen=True)
class Head:
    """One head, and how much of its attention goes where the pattern says.

    Attributes:
        layer: its layer.
        head: its index in the layer.
        path: the module path of its call.
        score: mean attention on the pattern's keys, between 0 and 1.
    """

    layer: int
    head: int
    path: str
    score: float

    @property
    def name(self) -> str:
        """``layer 1 head 2``."""
        return f"layer {self.layer} head {self.head}"

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


Pattern = Callable[[Call], Tensor]
"""From a call to the mean attention of each head (H) on the keys that count."""


def ranked(trace: Trace, pattern: Pattern) -> list[Head]:
    """All heads of a trace, the one that fits the pattern best first."""
    found = [
        Head(call.site.layer or 0, i, call.site.path, score)
        for call in trace
        for i, score in enumerate(pattern(call).tolist())
    ]
    return sorted(found, key=lambda head: -head.score)


def previous(call: Call) -> Tensor:
    """Attention from each position but the first two to the one before it."""
    weights = call.weights[0]
    query = torch.arange(2, weights.shape[1])
    return weights[:, query, query - 1].mean(-1)


def induction(call: Call) -> Tensor:
    """Attention in the second of two copies to the token that followed the current one in the first copy."""
    weights = call.weights[0]
    length = (weights.shape[1] - 1) // 2
    query = torch.arange(length + 1, 2 * length + 1)
    return weights[:, query, query - length + 1].mean(-1)


def same_word(tokens: Sequence[str], end: str = "[SEP]") -> Pattern:
    """Attention from a word of a sentence pair to its copies in the other sentence, over the words that have any.

    Args:
        tokens: the tokens of the pair, each sentence closed by ``end``.
        end: that token.
    """
    middle = tokens.index(end)
    word = [t.isalpha() for t in tokens]
    copies = torch.tensor(
        [
            [word[i] and tokens[i] == tokens[j] and (i < middle) != (j < middle) for j in range(len(tokens))]
            for i in range(len(tokens))
        ]
    )

    def measure(call: Call) -> Tensor:
        weights = call.weights[0]
        return (weights * copies).sum(-1)[:, copies.any(-1)].mean(-1)

    return measure
