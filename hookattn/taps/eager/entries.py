"""Where every entry of a tensor came from, for scores and weights that were moved about.

Moving entries about does the same to their numbers: the operations that moved them run again on numbers instead, once a
softmax and a product with values have shown that it is worth it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Number = Callable[[Any], int]


class Entries:
    """The numbers of a tensor's entries, made when they are asked for; −1 is none.

    Args:
        make: from the numbers of ``of`` to these.
        of: where the entries came from.
        source: instead, what has entries of its own, and their shape.
    """

    __slots__ = ("make", "of", "shape", "source")

    def __init__(
        self,
        make: Callable[..., Tensor] | None = None,
        of: Sequence[Entries] = (),
        source: Any = None,
        shape: tuple[int, ...] = (),
    ):
        self.make, self.of, self.source, self.shape = make, tuple(of), source, shape

    def sources(self) -> list[Any]:
        """What the entries came from in the first place, each once."""
        found: list[Any] = []
        waiting: list[Entries] = [self]
        while waiting:
            one = waiting.pop()
            if one.source is not None and all(one.source is not x for x in found):
                found.append(one.source)
            waiting.extend(reversed(one.of))
        return found

    def numbers(self, first: Number, device: torch.device) -> Tensor:
        """The number of every entry; ``first``: that of the first entry of a source."""
        if self.make is not None:
            return self.make(*(one.numbers(first, device) for one in self.of))
        n = 1
        for extent in self.shape:
            n *= extent
        return torch.arange(n, device=device).view(self.shape) + first(self.source)
