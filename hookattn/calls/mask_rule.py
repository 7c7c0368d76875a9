"""The mask of a call as what its kernel hides by itself and the mask that it was given; formed when it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Size, Tensor

from ..attention.functional import with_four_axes
from ..attention.masks import CompleteMask, Diagonal, complete_mask
from .derived_cache import DERIVED_CACHE


@dataclass(eq=False)
class MaskRule:
    """The complete mask of one call, or of several that have the same.

    Attributes:
        given: bool, broadcastable to B H T S, the mask that the kernel was given; nobody writes to it. None: none.
        t, s: how many queries and keys it is of.
        diagonal: what the kernel hides by itself.
        device: where the mask is made.
        rows: T, int64, which queries of the whole call these are; None: all, in their order.
    """

    given: Tensor | None
    t: int
    s: int
    diagonal: Diagonal
    device: torch.device
    rows: Tensor | None = None
    made: dict[str, CompleteMask] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "made": {}}  # a copy and a pickle derive anew

    def __call__(self) -> Tensor:
        """bool, broadcastable to B H T S, True = may attend."""
        return self.complete().mask

    @property
    def shape(self) -> Size:
        """That of the mask, which is not formed for it."""
        shape = Size((1, 1, 1, 1)) if self.given is None else with_four_axes(self.given).shape
        if self.diagonal.hides_any:
            shape = Size(max(pair) for pair in zip(shape, (1, 1, self.t, self.s), strict=True))
        return shape

    def complete(self) -> CompleteMask:
        """The mask and what it does; formed once, as long as there is room for it."""
        return DERIVED_CACHE.get(self, "mask", self._complete)

    def _complete(self) -> CompleteMask:
        given = self.given
        if given is not None:
            given = with_four_axes(given if given.dtype == torch.bool else given.bool())
        return complete_mask(given, self.t, self.s, self.diagonal, self.device, self.rows)

    def leaves_empty(self) -> bool:
        """Whether there are queries that may attend to no key, where no mask was given; none is formed for it."""
        return not bool(self.diagonal.sees_any(self.numbers(), self.s).all())

    def numbers(self) -> Tensor:
        """T, int64: which queries of the whole call these are."""
        return torch.arange(self.t, device=self.device) if self.rows is None else self.rows

    def of(self, batch: slice | Tensor, heads: slice | Tensor, rows: slice | Tensor) -> MaskRule:
        """That of some batch entries, heads and queries."""
        given = self.given
        every = slice(None)
        axes = (1, 1, 1) if given is None else with_four_axes(given).shape
        whole = [isinstance(index, slice) and index == every for index in (batch, heads, rows)]
        if whole[2] and all(n == 1 or all_of_it for n, all_of_it in zip(axes, whole[:2], strict=False)):
            return self  # and so the mask is formed once for all
        if given is not None:
            given = with_four_axes(given)
            for dim, index in enumerate((batch, heads, rows)):
                if given.shape[dim] > 1:
                    given = _indexed(given, dim, index)
        numbers = _indexed(self.numbers(), 0, rows)
        return MaskRule(given, len(numbers), self.s, self.diagonal, self.device, numbers)

    def of_keys(self, keys: slice) -> MaskRule:
        """That of the first of the keys."""
        s = len(range(self.s)[keys])
        if s == self.s:
            return self
        given = None if self.given is None else with_four_axes(self.given)[..., :s]
        return MaskRule(given, self.t, s, self.diagonal, self.device, self.rows)


def _indexed(x: Tensor, dim: int, index: slice | Tensor) -> Tensor:
    if isinstance(index, slice):
        return x[(slice(None),) * dim + (index,)]
    return x.index_select(dim, index.to(x.device))
