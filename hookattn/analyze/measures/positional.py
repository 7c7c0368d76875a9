"""Heads whose largest weight is a fixed number of tokens away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from ... import checks
from ... import statistics as st
from ...errors import MeasureError
from ..call_view import View
from ..frame import long_table, views
from .base import Measure

if TYPE_CHECKING:
    from pandas import DataFrame

    from ...traces import TraceLike

_TOP = st.TopK(1)


@dataclass(frozen=True)
class Positional(Measure):
    """The share of queries i whose largest weight is at key i + offset (Voita et al. 2019, who take −1 and 1).

    A head is positional, they say, from 0.9 on. They leave out the end-of-sentence token as a query; ``real=`` can say
    that it is none. Which of several equal weights is the largest is not defined.

    Args:
        offset: None: of each head the one that most of the batch's queries have (:func:`best_offset` says which).
    """

    name: ClassVar[str] = "positional"
    unit: ClassVar[str] = "share"
    positional: ClassVar[bool] = True
    offset: int | None = None

    def __post_init__(self) -> None:
        if self.offset is not None:
            object.__setattr__(self, "offset", checks.whole("Positional: offset", self.offset, error=MeasureError))

    @property
    def statistics(self) -> tuple[st.Statistic, ...]:
        """See :class:`Measure`."""
        return (_TOP,)

    def problem(self, view: View) -> str | None:
        """See :class:`Measure`."""
        return super().problem(view) or view.lost

    def rows(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        offset = _commonest_offset(view) if self.offset is None else torch.tensor([self.offset])
        return (_largest_offsets(view) == offset.view(1, -1, 1).to(view.rows.device)).to(torch.float32)


def best_offset(trace: TraceLike, *, real: Any = None) -> DataFrame:
    """Where each head's largest weight is most often.

    Args:
        trace: with weights, or the statistic ``TopK(1)``.
        real: bool or 0/1, B S: True = a real token, no padding.

    Returns:
        A DataFrame: the columns of the call, ``head``, ``offset`` (of several as frequent the least;
        NaN where no query counts) and ``share`` of the queries that have it, as in :class:`Positional`.

    Raises:
        MeasureError: the queries and keys of a call are not places in one sequence.
        FieldNotCaptured: neither weights nor the statistic were kept.
    """
    import pandas as pd

    frames = []
    for view in views(trace, real):
        reading = Positional().of(view)
        frames.append(
            long_table(view, {"head": view.heads}, {"offset": _commonest_offset(view), "share": reading.heads})
        )
    table = pd.concat(frames, ignore_index=True)
    return table.assign(offset=table["offset"].where(table["share"].notna()))


_NONE = torch.iinfo(torch.int64).min


def _largest_offsets(view: View) -> Tensor:
    """B H T: key − query of each largest weight; a number that is none for a row without any weight."""
    keys = view.stat(_TOP, field=_TOP.fields[1])[..., 0]
    assert view.positions is not None
    return torch.where(keys >= 0, keys - view.positions.unsqueeze(1), _NONE)


def _commonest_offset(view: View) -> Tensor:
    """H: the offset that most queries of the batch have."""
    b, h, t, s = view.shape
    offsets = _largest_offsets(view).clamp_min(-s)
    # A histogram of offsets for each head; argmax takes the first of several equal counts, which is the least offset.
    counts = torch.zeros(h, 2 * s + 1, dtype=torch.int64, device=offsets.device)
    counted = (view.rows.unsqueeze(1) & (offsets > -s)).expand(b, h, t).long()
    by_head = "b h t -> h (b t)"
    counts.scatter_add_(1, rearrange(offsets + s, by_head), rearrange(counted, by_head))
    return counts.argmax(1) - s
