"""Whether what several ranks have in common is the same: keys that each has a copy of, a mask, the keys of all queries.

Checksums in the headers of files tell for nothing that two tensors are the same to the last bit. Where they do not, the
numbers are compared: two ranks may round differently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..calls.certificate import tolerance
from ..calls.fields import InFile, Place, shape_of, tensor_of
from ..calls.key_history import Continued
from ..calls.mask_rule import MaskRule


def same(one: Place, other: Place) -> bool:
    """Whether two fields are the same, but for rounding."""
    if one is other or _known_alike(one, other):
        return True
    if shape_of(one) != shape_of(other):
        return False
    a, b = tensor_of(one), tensor_of(other)
    assert a is not None and b is not None
    return same_numbers(a, b)


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, but for the rounding of their dtype."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    b = b.to(a.device)
    if torch.equal(a, b):
        return True
    if not a.dtype.is_floating_point:
        return False
    size = torch.nan_to_num(a.detach().abs().float(), 0.0, 0.0, 0.0).amax().item() if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=tolerance(a.dtype) * size, equal_nan=True)


def _known_alike(one: Place, other: Place) -> bool:
    """Whether nothing has to be read to know that they are the same."""
    if isinstance(one, InFile) and isinstance(other, InFile):
        sums = _checksum(one.file, one.name), _checksum(other.file, other.name)
        return sums[0] is not None and sums[0] == sums[1]
    if isinstance(one, Continued) and isinstance(other, Continued):
        return _same_steps(one, other)
    if isinstance(one, MaskRule) and isinstance(other, MaskRule):
        if (one.t, one.s, one.diagonal, one.rows is None) != (other.t, other.s, other.diagonal, other.rows is None):
            return False
        rows = one.rows is None or other.rows is None or torch.equal(one.rows, other.rows.to(one.rows.device))
        if one.given is None or other.given is None:
            return rows and one.given is other.given
        return rows and same_numbers(one.given, other.given)
    return False


def _same_steps(one: Continued, other: Continued) -> bool:
    """Whether a step of two histories adds the same to the steps before, which are compared as steps of their own."""
    if one.step != other.step or one.history.link(one.step) != other.history.link(other.step):
        return False
    names = [getattr(place.history, "names", None) for place in (one, other)]
    if None in names or one.step == 0:
        return same_numbers(one.history.own(one.step), other.history.own(other.step))
    found: list[int | None] = []
    for place in (one, other):
        history: Any = place.history
        last = history.names(place.step)[-1:]
        found.append(_checksum(history.file, last[0]) if last else 0)
    if found[0] is not None and found[0] == found[1]:
        return True
    return same_numbers(one.history.own(one.step), other.history.own(other.step))


def _checksum(file: Any, name: str) -> int | None:
    """That of a tensor in a finished file; None: there is none."""
    known = getattr(file, "checksum", None)
    return None if known is None else known(name)
