"""``mean``: an ablation that keeps what an entry is on average, and takes away what it says of this input."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from ..calls.trace_data import TraceData
from ..traces import TraceLike
from .base import Edit, field_of
from .edited_call import EditedCall
from .samples import check_whole, named, over_of, renormalised, samples_of
from .where import Where


class Mean(Edit):
    """See :func:`mean`."""

    name = "mean"
    by_position = True

    def __init__(self, field: str, over: TraceLike | TraceData | str, **where: Unpack[Where]):
        super().__init__(field, **where)
        self.over = over_of(over)

    def new(self, call: EditedCall) -> Tensor:
        if isinstance(self.over, TraceData):
            return self._of_corpus(call, self.over)
        if self.field not in ("k", "v") or self.over == "batch":
            check_whole(call, self, self.over)
        if self.over == "batch":
            return call.value.mean(0, keepdim=True)
        made = call.value.mean(2, keepdim=True)
        return renormalised(call, made) if self.field == "weights" else made

    def _of_corpus(self, call: EditedCall, corpus: TraceData) -> Tensor:
        """Of vectors over batch entries, steps and positions; of weights position by position."""
        if self.field in ("scores", "weights"):
            made = torch.stack([x.mean(0, keepdim=True) for x in samples_of(corpus, call, self)]).mean(0)
            return renormalised(call, made) if self.field == "weights" else made
        total, count = None, 0
        for x in samples_of(corpus, call, self, positions=False):
            summed = x.sum((0, 2), keepdim=True)
            total, count = summed if total is None else total + summed, count + x.shape[0] * x.shape[2]
        assert total is not None
        return total / count

    @property
    def note(self) -> str:
        return f"over {named(self.over)}"


def mean(field: str = "output", over: TraceLike = "positions", **where: Unpack[Where]) -> Edit:
    """Put a mean in the place of entries of a field.

    Weights are, afterwards, made 0 where the mask hides a key, and to sum to 1.

    Args:
        field: ``q``, ``k``, ``v``, ``scores``, ``weights`` or ``output``.
        over: ``"positions"``: of the queries of the same batch entry (of ``k`` and ``v``: of the keys); ``"batch"``: of
            the batch entries, position by position; or a trace (or the path of its file), of whose calls at the same
            site: of vectors over all their batch entries and positions, of scores and weights position by position.
        where: see :class:`~hookattn.edit.where.Where`. The mean is of the selected entries.

    Raises:
        SelectionError, InputError: there is no such field, the selection is none, or ``over`` is none of these.
        EditError: as the model runs, if the trace has no such call, or the shapes do not fit.
    """
    return Mean(field_of("mean", field), over, **where)
