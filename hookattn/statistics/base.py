"""What a statistic is: a frozen description of a number for each head and query, or each head and key."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .block import Block

Out = dict[str, Tensor]


@dataclass(frozen=True)
class Statistic:
    """One statistic with its parameters. Pure: what it is of comes as :class:`~hookattn.statistics.block.Block`.

    Subclasses set ``name`` and write :meth:`write`; those with parameters name them in :attr:`key`.
    """

    name: ClassVar[str]
    positional: ClassVar[bool] = False
    """Whether it needs to know at which key position each query is."""
    last: ClassVar[bool] = False
    """Whether it writes over ``block.shifted``, for want of more memory in the cache; only one statistic may."""

    of_scores: ClassVar[bool] = False
    """Whether it is of the scores themselves, so that weights tell it up to a constant alone."""
    axes: ClassVar[str] = "BHT"
    """A letter for each axis of its fields; ``*`` at the end: one more, of its own."""
    integers: ClassVar[frozenset[str]] = frozenset()
    """The plain names of those of its fields that are int64; the others are floating."""

    @property
    def key(self) -> str:
        """The field's name in a call and in the file, for example ``first_mass(4)``."""
        return self.name

    @property
    def parameters(self) -> dict[str, Any]:
        """Its parameters as plain data, for the file."""
        return asdict(self)

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields that it makes."""
        return (self.key,)

    def allocate(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Out:
        """Its fields as they are for a call in which no query has a key; ``shape`` is B H T S."""
        return {self.key: torch.zeros(shape[:3], dtype=dtype, device=device)}

    def columns(self) -> int:
        """How many vectors over the keys it wants the products with the weights of: one pass for all statistics."""
        return 0

    def fill(self, columns: Tensor, keys: slice, reach: tuple[int, int] | None) -> None:
        """Write these vectors.

        Args:
            columns: N n, of zeros when it is first called.
            keys: which keys these n are; all of them for vectors that are the same for all rows.
            reach: None: write the vectors that are the same for all rows. Else the first and the last key position of
                the queries of the next block: write those that are not.
        """

    def write(self, block: Block, sums: Tensor, out: Out) -> None:
        """Put its values of one block of rows into ``out``.

        Args:
            block: some rows of some heads.
            sums: b h R N, the products of the block's ``mass`` with its columns.
            out: what :meth:`allocate` returned.
        """
        raise NotImplementedError

    def problem(self, s: int) -> str | None:
        """What a reader has to know of a call with ``s`` keys."""
        return None
