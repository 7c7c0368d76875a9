"""``add``: steering. A vector is added to what a head returns, or a bias to its scores."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from .base import Edit, field_of, values_of
from .edited_call import EditedCall
from .where import Where


class Add(Edit):
    """See :func:`add`."""

    name = "add"
    additive = True

    def __init__(self, field: str, values: Tensor | float, **where: Unpack[Where]):
        super().__init__(field, **where)
        self.values = values_of("values", values)

    def addend(self, call: EditedCall) -> Tensor | float:
        """What is added, broadcastable to ``call.value``."""
        return self.values

    def new(self, call: EditedCall) -> Tensor:
        return call.value + self.check(call, self.addend(call))


def add(field: str, values: Tensor | float, **where: Unpack[Where]) -> Edit:
    """Add to entries of a field. What is added to ``scores`` is a bias, which kernels that take one are given.

    Args:
        field: ``q``, ``k``, ``v``, ``scores``, ``weights`` or ``output``.
        values: broadcastable to the selected entries: a vector of E for ``output``, say. They may want a gradient.
        where: see :class:`~hookattn.edit.where.Where`.

    Raises:
        SelectionError, InputError: there is no such field, the selection is none, or ``values`` are none.
        EditError: as the model runs, if the shapes do not fit.
    """
    return Add(field_of("add", field), values, **where)
