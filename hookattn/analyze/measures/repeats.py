"""What heads do with a token that has been there before."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..pairs import PairMass


@lru_cache(maxsize=32)  # a token that is everywhere has S² / 2 pairs
def earlier(tokens: tuple[Any, ...]) -> Tensor:
    """2 P: each place of a sequence, and each place before it that has the same token.

    Args:
        tokens: S, strings or ids.
    """
    numbers: dict[Any, int] = {}
    ids = torch.tensor([numbers.setdefault(token, len(numbers)) for token in tokens])
    return (ids.unsqueeze(1) == ids).tril(-1).nonzero().T


@dataclass(frozen=True)
class DuplicateToken(PairMass):
    """The weight on all earlier occurrences of the query's own token (Wang et al. 2022), see :class:`PairMass`."""

    name: ClassVar[str] = "duplicate_token"

    def related(self, tokens: tuple[Any, ...]) -> Tensor:
        """See :class:`PairMass`."""
        return earlier(tokens)


@dataclass(frozen=True)
class Induction(PairMass):
    """The weight on the tokens that came after earlier occurrences of the query's own token (Olsson et al. 2022).

    See :class:`PairMass`. Where a token follows itself, what came after is the query's own place, and counts.
    """

    name: ClassVar[str] = "induction"

    def related(self, tokens: tuple[Any, ...]) -> Tensor:
        """See :class:`PairMass`."""
        return earlier(tokens) + torch.tensor([[0], [1]])
