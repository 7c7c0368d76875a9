"""``knockout``: edges from queries to keys are cut, as if the mask had hidden them."""

from __future__ import annotations

from typing import Unpack

from ..errors import SelectionError
from .base import Edit
from .edited_call import EditedCall
from .where import Where


class Knockout(Edit):
    """See :func:`knockout`."""

    name = "knockout"

    def __init__(self, **where: Unpack[Where]):
        super().__init__("mask", **where)

    def new(self, call: EditedCall) -> float:
        return 0.0

    def __repr__(self) -> str:
        return f"edit.knockout({self.where})"


def knockout(**where: Unpack[Where]) -> Edit:
    """Hide keys from queries: the rows renormalise, as if the keys had been masked (Geva et al. 2023, "Dissecting
    recall of factual associations in auto-regressive language models").

    A query that is left nothing to attend to gets an output of 0.

    Args:
        where: see :class:`~hookattn.edit.where.Where`; ``queries`` or ``keys`` has to be among it.

    Raises:
        SelectionError: neither was given: every edge would be cut; ``edit.zero("output")`` does that.
    """
    if where.get("queries") is None and where.get("keys") is None:
        raise SelectionError(
            "edit.knockout(): say queries= or keys=; without them every edge is cut, which edit.zero('output') does."
        )
    return Knockout(**where)
