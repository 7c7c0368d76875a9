"""Which elements of a row-major tensor an index selects, without the tensor."""

from __future__ import annotations

import operator
from typing import NamedTuple, SupportsIndex

Index = SupportsIndex | slice | tuple[SupportsIndex | slice, ...]


class Selection(NamedTuple):
    """A strided view: counted in elements, from the first one of the tensor."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """The number of elements from the first to the last one selected, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


def select(shape: tuple[int, ...], index: Index) -> Selection:
    """Apply integers and slices to the leading dimensions, as ``tensor[index]`` does.

    Raises:
        IndexError: more indices than dimensions, or an integer out of range.
        TypeError: something other than an integer or a slice.
        ValueError: a slice with a step below 1.
    """
    parts = index if isinstance(index, tuple) else (index,)
    if len(parts) > len(shape):
        raise IndexError(f"{len(parts)} indices for the shape {shape}")
    offset, sizes, strides = 0, list(shape[len(parts) :]), []
    stride = 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    strides.reverse()
    kept: list[tuple[int, int]] = []
    for dim, (part, size) in enumerate(zip(parts, shape, strict=False)):
        if isinstance(part, slice):
            begin, end, step = part.indices(size)
            if step < 1:
                raise ValueError(f"a slice's step must be at least 1, and it is {step}")
            offset += min(begin, size) * strides[dim]
            kept.append((len(range(begin, end, step)), strides[dim] * step))
            continue
        if isinstance(part, bool):  # to a tensor it is a mask, to operator.index it is 0 or 1
            raise TypeError("expected integers and slices as the index, and got a bool")
        try:
            at = operator.index(part)
        except TypeError:
            kind = type(part).__name__
            raise TypeError(f"expected integers and slices as the index, and got {kind}") from None
        if not -size <= at < size:
            raise IndexError(f"index {at} is out of range for dimension {dim} of the shape {shape}")
        offset += at % size * strides[dim]
    return Selection(
        offset,
        (*(count for count, _ in kept), *sizes),
        (*(step for _, step in kept), *strides[len(parts) :]),
    )
