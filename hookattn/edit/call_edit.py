"""``call``: a function of one's own, given the attention as it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

from torch import Tensor

from .. import checks
from .base import Edit, field_of
from .edited_call import EditedCall
from .where import Where


class Function(Edit):
    """See :func:`call`."""

    name = "call"

    def __init__(self, function: Callable[[EditedCall], Tensor | float], field: str, **where: Unpack[Where]):
        super().__init__(field, **where)
        self.function = checks.function("function", function)

    def new(self, call: EditedCall) -> Tensor | float:
        return self.function(call)

    @property
    def note(self) -> str:
        return str(getattr(self.function, "__qualname__", type(self.function).__name__))


def call(function: Callable[[EditedCall], Tensor | float], field: str = "weights", **where: Unpack[Where]) -> Edit:
    """Let a function say the new values.

    Args:
        function: is given an :class:`~hookattn.edit.edited_call.EditedCall`, with ``value``, the selected entries of
            the field, and ``site``, ``step``, ``q``, ``k``, ``v``, ``mask`` and what else there is; returns values in
            the shape of ``value``. If it returns ``value`` itself, nothing is done.
        field: ``q``, ``k``, ``v``, ``scores``, ``weights`` or ``output``.
        where: see :class:`~hookattn.edit.where.Where`.

    Raises:
        SelectionError, InputError: there is no such field, the selection is none, or ``function`` is none.
        EditError: as the model runs, if what it returns does not fit.
    """
    return Function(function, field_of("call", field), **where)
