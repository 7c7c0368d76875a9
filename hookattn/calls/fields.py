"""Where a field of a call is.

``Call.fields`` maps the name of each captured field to one of these, and each says one thing alone:

- :data:`Here`: the tensor itself.
- :class:`Derived`: it follows from the call's other fields, and is made of them when it is read.
- :class:`~hookattn.calls.mask_rule.MaskRule`: a mask, as what the kernel hides by itself and what it was given.
- :class:`PartOf`: some batch entries, heads and queries of another field, taken when it is read.
- :class:`~hookattn.calls.key_history.Continued`: the keys or values of one step of a generation.
- :class:`EditedRows`: it follows from others but for some rows, which an edit has set.
- :class:`Later`: it arrives from a GPU, or is put together, when it is first read.
- :class:`InFile`: it is in a trace file, finished or not, and is read from there.
- :data:`Absent`: the call has none (a bias, say), which is known.

A field that was not captured has no entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Size, Tensor

from ..attention.places import exchanged
from .key_history import Continued
from .mask_rule import MaskRule

Index = slice | tuple[int, ...]
"""Some positions of an axis: a slice with a positive step, or in any order."""


class File(Protocol):
    """A file of named tensors."""

    def tensor(self, name: str) -> Tensor:
        """One of them; the caller may write to it."""

    def slice(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """What ``tensor(name)[index]`` is, of which little more is read."""

    def shape(self, name: str) -> Size:
        """Its shape, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype, without reading it."""


class Later(partial[Tensor]):
    """``Later(load, *args)``: a field that is made when it is read, by ``load(*args)``."""

    __slots__ = ()


class Derived:
    """A field that was asked for and follows from others; see :mod:`hookattn.calls.derivation`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "derived"

    def __reduce__(self) -> str:
        return "DERIVED"  # there is one alone, in a copy and in another process as well


DERIVED = Derived()


@dataclass(frozen=True, slots=True)
class InFile:
    """A field that is in a file.

    Attributes:
        file: which.
        name: of the tensor in it.
    """

    file: File
    name: str

    def __call__(self) -> Tensor:
        """The tensor, read anew each time."""
        return self.file.tensor(self.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> InFile:
        # What is in the file does not change, and a file that is being written has no second one.
        return self


@dataclass(frozen=True, slots=True)
class PartOf:
    """Some positions of a field.

    Attributes:
        whole: the field, a tensor or where one is.
        index: which positions of each of its first axes, each once. An axis of size 1 stays as it is: it stands for all
            positions, or it has the one that is asked for.
    """

    whole: Place
    index: tuple[Index, ...]

    def __call__(self) -> Tensor:
        """The part: a view where slices say it; of a file little more is read."""
        shape = shape_of(self.whole)
        index = self._index(shape)
        x = self.whole
        if isinstance(x, InFile):
            # What is no slice is read up to its last position and chosen from afterwards.
            bounds = tuple(i if isinstance(i, slice) else slice(min(i), max(i) + 1) for i in index)
            x = x.file.slice(x.name, bounds)
            index = [
                slice(None) if isinstance(i, slice) else tuple(n - b.start for n in i)
                for i, b in zip(index, bounds, strict=True)
            ]
        tensor = x if isinstance(x, Tensor) else x()
        for dim, i in enumerate(index):
            tensor = taken(tensor, dim, i)
        return tensor

    @property
    def shape(self) -> Size:
        """Its shape; nothing in a file is read for it."""
        whole = shape_of(self.whole)
        sizes = [_count(i, n) for i, n in zip(self._index(whole), whole, strict=False)]
        return Size([*sizes, *whole[len(sizes) :]])

    def _index(self, shape: Sequence[int]) -> list[Index]:
        return [slice(None) if n == 1 else i for i, n in zip(self.index, shape, strict=False)]


class Deriving(Protocol):
    """A call that a field can be derived of."""

    def derived(self, name: str) -> Tensor:
        """It."""


@dataclass(frozen=True, slots=True, eq=False)
class EditedRows:
    """Weights of which an edit has set some rows; the others follow from the call, and are derived when they are read.

    Attributes:
        of: the call, as if nothing had been set.
        name: of the field.
        shape, dtype: its own.
        places: batch entries, heads and queries of the rows; None: all.
        rows: what was set, with an extent for each of the places.
    """

    of: Deriving
    name: str
    shape: Size
    dtype: torch.dtype
    places: tuple[tuple[int, ...] | None, ...]
    rows: Tensor

    def __call__(self) -> Tensor:
        """The whole field."""
        return exchanged(self.of.derived(self.name), self.places, self.rows)


def taken(x: Tensor, dim: int, index: Index) -> Tensor:
    """Some positions of an axis: a view where a slice says it."""
    if isinstance(index, slice):
        return x if index == slice(None) else x[(slice(None),) * dim + (index,)]
    return x.index_select(dim, torch.tensor(index, device=x.device))


def _count(index: Index, n: int) -> int:
    return len(range(*index.indices(n))) if isinstance(index, slice) else len(index)


Here: TypeAlias = Tensor
Absent: TypeAlias = None
Place: TypeAlias = Here | MaskRule | PartOf | Continued | EditedRows | Later | InFile
"""Where a field is that needs no others."""
Field: TypeAlias = Place | Derived | Absent


def tensor_of(field: Place | Absent) -> Tensor | None:
    """The field's tensor, made or read if it is not here; None where the call has none."""
    return field if field is None or isinstance(field, Tensor) else field()


def shape_of(field: Place) -> Size:
    """The field's shape; what is in a file is not read for it."""
    if isinstance(field, InFile):
        return field.file.shape(field.name)
    return field().shape if isinstance(field, Later) else field.shape


def dtype_of(field: Place) -> torch.dtype:
    """The field's dtype; what is in a file is not read for it."""
    if isinstance(field, InFile):
        return field.file.dtype(field.name)
    if isinstance(field, MaskRule):
        return torch.bool
    if isinstance(field, PartOf):
        return dtype_of(field.whole)
    if isinstance(field, Continued):
        return field.history.dtype
    if isinstance(field, EditedRows):
        return field.dtype
    return field.dtype if isinstance(field, Tensor) else field().dtype
