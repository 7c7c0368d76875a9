"""``set``: values of one's own."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from .base import Edit, field_of, values_of
from .edited_call import EditedCall
from .where import Where


class Set(Edit):
    """See :func:`set`."""

    name = "set"

    def __init__(self, field: str, values: Tensor | float, **where: Unpack[Where]):
        super().__init__(field, **where)
        self.values = values_of("values", values)

    def new(self, call: EditedCall) -> Tensor | float:
        return self.values


def set(field: str, values: Tensor | float, **where: Unpack[Where]) -> Edit:
    """Set entries of a field.

    Args:
        field: ``q``, ``k``, ``v``, ``scores``, ``weights`` or ``output``.
        values: in the shape of the selected entries (B H T S of ``weights``, say, with as many heads as were selected),
            or such as broadcast to it. They may want a gradient.
        where: see :class:`~hookattn.edit.where.Where`.

    Raises:
        SelectionError, InputError: there is no such field, the selection is none, or ``values`` are none.
        EditError: as the model runs, if the shapes do not fit.
    """
    return Set(field_of("set", field), values, **where)
