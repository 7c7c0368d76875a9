"""Tensors with shapes and no values, and what can be told of the operators that run on them.

The meta device is public and not enough: it forgets on which device a tensor would be, and takes no real tensors beside
those without values, which a plan keeps so that a model's decisions come out as they would. ``torch.export`` is public
and traces a model as a whole, under rules of its own.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from .private import private

_PIECE = "plans on shapes alone"
_MODULE = "torch._subclasses.fake_tensor"

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
        UnsupportedFakeTensorException,
        UnsupportedOperatorException,
    )
else:
    FakeTensor = private(_MODULE, "FakeTensor", _PIECE)
    FakeTensorMode = private(_MODULE, "FakeTensorMode", _PIECE)
    DataDependentOutputException = private(_MODULE, "DataDependentOutputException", _PIECE)
    DynamicOutputShapeException = private(_MODULE, "DynamicOutputShapeException", _PIECE)
    UnsupportedFakeTensorException = private(_MODULE, "UnsupportedFakeTensorException", _PIECE)
    UnsupportedOperatorException = private(_MODULE, "UnsupportedOperatorException", _PIECE)

IMPOSSIBLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
"""What running on shapes raises where values are needed, or where an operator has no rule for shapes."""


@functools.cache
def _operators(*names: str) -> frozenset[Any]:
    """Operators of aten by name, as far as this torch has them."""
    return frozenset(getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name))


def reads_a_value(operator: Any) -> bool:
    """Whether an operator's result is a value out of a tensor: ``item()`` and its kind, or ``equal``."""
    return operator in _operators("_local_scalar_dense", "equal")


def is_equal(operator: Any) -> bool:
    """Whether an operator compares two tensors as a whole."""
    return operator in _operators("equal")


def is_grouped_mm(operator: Any) -> bool:
    """Whether an operator is the product of groups of rows with a matrix each."""
    return operator in _operators("_grouped_mm")


__all__ = [
    "IMPOSSIBLE",
    "FakeTensor",
    "FakeTensorMode",
    "is_equal",
    "is_grouped_mm",
    "reads_a_value",
]
