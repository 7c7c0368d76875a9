"""``patch``: values of another run."""

from __future__ import annotations

from os import PathLike
from typing import Unpack

from torch import Tensor

from .. import checks
from ..calls.call import Call
from ..calls.trace_data import TraceData
from ..traces import Trace, TraceLike, as_trace
from .base import Edit, field_of
from .edited_call import EditedCall
from .sources import counterpart, taken_from
from .where import Where


class Patch(Edit):
    """See :func:`patch`."""

    name = "patch"
    by_position = True

    def __init__(self, field: str, of: TraceLike | TraceData | Call | Tensor, **where: Unpack[Where]):
        super().__init__(field, **where)
        if isinstance(of, (str, PathLike)):
            of = as_trace(of, "of")
        checks.one_of("of", of, (TraceData, Call, Tensor), "a Trace, the path of its file, a Call or a tensor")
        self.of: TraceData | Call | Tensor = of

    def new(self, call: EditedCall) -> Tensor:
        of = self.of
        if isinstance(of, TraceData):
            of = counterpart(of, call, self)
        return taken_from(of, call, self) if isinstance(of, Call) else of

    @property
    def note(self) -> str:
        of = self.of
        if isinstance(of, TraceData):
            return f"of {of.path}" if of.path else "of another trace"
        return f"of {of.site.label}, step {of.step}" if isinstance(of, Call) else ""


class Freeze(Patch):
    """See :func:`freeze`."""

    name = "freeze"


def patch(field: str, of: TraceLike | Call | Tensor, **where: Unpack[Where]) -> Edit:
    """Put the values of another run in the place of this one's (activation patching: Vig et al. 2020).

    Args:
        field: ``q``, ``k``, ``v``, ``scores``, ``weights`` or ``output``.
        of: a trace (or the path of its file), of which each call takes the values of the same site and step; a call; or
            a tensor, broadcastable to the selected entries. Entries are the same by the numbers of heads and by the
            positions of queries and keys in the sequence.
        where: see :class:`~hookattn.edit.where.Where`.

    Raises:
        SelectionError, InputError: there is no such field, the selection is none, or ``of`` is none of these.
        EditError: as the model runs, if there is no such call, or the shapes do not fit.
    """
    return Patch(field_of("patch", field), of, **where)


def freeze(of: Trace | str | PathLike[str], **where: Unpack[Where]) -> Edit:
    """Keep the attention patterns of another run: what is changed upstream moves no weights, and what passes through
    the heads is linear in what they read (Elhage et al. 2021, "A mathematical framework for transformer circuits").

    Args:
        of: the trace whose weights are kept, or the path of its file.
        where: see :class:`~hookattn.edit.where.Where`; by default every call.

    Raises:
        SelectionError, InputError: the selection is none, or ``of`` is no trace.
        EditError: as the model runs, if the trace has no call of a site and step, or of other shapes.
    """
    return Freeze("weights", as_trace(of, "of"), **where)
