"""Where a field of a call is.

``Call.fields`` maps the name of each captured field to one of four things, and each says one thing alone:

- :data:`Here`: the tensor itself.
- :class:`Later`: it is derived, or arrives from a GPU, when it is first read.
- :class:`InFile`: it is in a trace file, finished or not, and is read from there.
- :data:`Absent`: the call has none (a bias, say), which is known.

A field that was not captured has no entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Size, Tensor


class File(Protocol):
    """A file of named tensors."""

    def tensor(self, name: str) -> Tensor:
        """One of them; the caller may write to it."""

    def shape(self, name: str) -> Size:
        """Its shape, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype, without reading it."""


class Later(partial[Tensor]):
    """``Later(load, *args)``: a field that is made when it is read, by ``load(*args)``."""

    # A partial, as two are made for each small call while the model runs, and this takes no Python of its own.
    __slots__ = ()


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


Here: TypeAlias = Tensor
Absent: TypeAlias = None
Field: TypeAlias = Here | Later | InFile | Absent


def tensor_of(field: Field) -> Tensor | None:
    """The field's tensor, made or read if it is not here; None where the call has none."""
    return field if field is None or isinstance(field, Tensor) else field()


def shape_of(field: Here | Later | InFile) -> Size:
    """The field's shape; what is in a file is not read for it."""
    return field.file.shape(field.name) if isinstance(field, InFile) else _made(field).shape


def dtype_of(field: Here | Later | InFile) -> torch.dtype:
    """The field's dtype; what is in a file is not read for it."""
    return field.file.dtype(field.name) if isinstance(field, InFile) else _made(field).dtype


def _made(field: Here | Later) -> Tensor:
    return field if isinstance(field, Tensor) else field()
