"""What a measure is: a frozen description of one number for each head of a call, in every batch entry."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...cached import cached_property
from ...errors import MeasureError
from ...statistics.base import Statistic
from ..call_view import View
from ..reading import Reading
from ..table import measure_table

if TYPE_CHECKING:
    from pandas import DataFrame

    from ...traces import TraceLike


@dataclass(frozen=True)
class Measure:
    """One measure with its parameters. Calling it on a trace gives a table: one row for each call and head.

    Subclasses set ``name`` and ``unit``, say in ``statistics`` what they are made of, and write :meth:`rows` (a number
    for each query, which is averaged over the rows that count) or :meth:`read`.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    """``nats``, ``keys``, ``share`` (of the attention, 0 to 1), ``correlation`` (−1 to 1), …"""
    positional: ClassVar[bool] = False
    """Whether queries and keys have to be places in one sequence."""
    distribution: ClassVar[bool] = True
    """Whether weights have to be a distribution over the keys, as a softmax makes it."""

    @cached_property
    def key(self) -> str:
        """The column's name: the name, and the parameters that are not the defaults, as in ``local_mass(window=8)``."""
        given = [f for f in fields(self) if f.repr and getattr(self, f.name) != f.default]
        return self.name + (f"({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})" if given else "")

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The statistics it is computed of: captured beside the kernel, or computed of a call's weights."""
        return ()

    reads: ClassVar[tuple[str, ...]] = ()
    """The fields of a call that it reads beside its statistics; nothing in both: the weights."""

    @property
    def capture(self) -> tuple[str | Statistic, ...]:
        """What ``capture=`` has to keep for it."""
        return (*self.statistics, *self.reads) or ("weights",)

    def problem(self, view: View) -> str | None:
        """Why it is not defined for a call; None: it is."""
        if self.distribution and view.no_distribution is not None:
            return view.no_distribution
        if self.positional and view.positions is None:
            return "it needs queries and keys that are places in one sequence"
        return None

    def rows(self, view: View) -> Tensor:
        """B H T: its value for each query.

        Args:
            view: the call.
        """
        raise NotImplementedError

    def counted(self, view: View) -> Tensor:
        """bool, B T or B H T: the rows that its mean is over."""
        return view.rows

    def read(self, view: View) -> Reading:
        """Its value for each head of a call: the mean of :meth:`rows` over :meth:`counted`."""
        values, counted = self.rows(view), self.counted(view)
        own = (counted if counted.dim() == 3 else counted.unsqueeze(1)).expand(values.shape)
        return Reading(view.mean(values, own), own.sum(-1), torch.where(own, values, torch.nan))

    def of(self, view: View) -> Reading:
        """:meth:`read`, for a call that it is defined for.

        Raises:
            MeasureError: it is not; names the measure and the call.
        """
        why = self.problem(view)
        if why is not None:
            raise MeasureError(f"{self.key} of {view.where}: {why}.")
        return self.read(view)

    def __call__(self, trace: TraceLike, *, by: str = "head", real: Any = None) -> DataFrame:
        """A table of this measure; see :func:`hookattn.analyze.measure`."""
        return measure_table(trace, [self], by=by, real=real)
