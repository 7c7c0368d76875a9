"""``zero``: an ablation. Weights of 0 mix no value, an output of 0 passes none on."""

from __future__ import annotations

from typing import Unpack

from .base import Edit, field_of
from .edited_call import EditedCall
from .where import Where


class Zero(Edit):
    """See :func:`zero`."""

    name = "zero"

    def new(self, call: EditedCall) -> float:
        return 0.0


def zero(field: str = "output", **where: Unpack[Where]) -> Edit:
    """Set entries of a field to 0.

    Args:
        field: ``q``, ``k``, ``v``, ``scores``, ``weights`` or ``output``.
        where: see :class:`~hookattn.edit.where.Where`.

    Raises:
        SelectionError, InputError: there is no such field, or the selection is none.
    """
    return Zero(field_of("zero", field), **where)
