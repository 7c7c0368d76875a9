"""Attention from tokens with one label to tokens with another: parts of speech, sentences of a pair, speakers, …"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import einsum
from torch import Tensor

from ... import checks
from ...errors import MeasureError
from ..call_view import View
from ..frame import long_table, views_of_heads
from ..labels import Rows, as_label_rows, piece_labels
from ..pairs import mass_on_keys
from .base import Measure

if TYPE_CHECKING:
    from pandas import DataFrame

    from ...traces import TraceLike

Labelled = list[tuple[Any, ...]] | str
"""B S, the label of each key (None: it has none); or why there is none."""


@dataclass(frozen=True)
class LabelMass(Measure):
    """``Σ_{j: label j = target} w_ij``, the mean over the queries labelled ``source`` (Vig & Belinkov 2019).

    NaN for a batch entry that has no such key or query. Without ``source`` it is their ``P_α(tag)``.

    Args:
        labels: text, ints or None; one for each token, or one for each word of the trace's tokens (special ones are
            none); one list, or one for each batch entry.
        target: the label of the keys.
        source: the label of the queries; None: all queries that count.
    """

    name: ClassVar[str] = "label_mass"
    unit: ClassVar[str] = "share"
    positional: ClassVar[bool] = True
    labels: Rows = field(repr=False)
    target: str | int
    source: str | int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", as_label_rows(self.labels, f"{self.name}: labels"))
        self._check_ends()

    def _check_ends(self) -> None:
        for end in ("target", "source"):
            label = getattr(self, end)
            if label is None and end == "source":
                continue
            if not isinstance(label, (str, int)) or isinstance(label, bool):
                raise checks.wrong(f"{type(self).__name__}: {end}", label, "a label, text or an int", MeasureError)

    def labelled(self, view: View) -> Labelled:
        """The labels of a call's keys."""
        return piece_labels(view, self.labels, "labels")

    def problem(self, view: View) -> str | None:
        """See :class:`Measure`."""
        found = super().problem(view) or self.labelled(view)
        if isinstance(found, str):
            return found
        known = {label for row in found for label in row}
        absent = [str(x) for x in (self.target, self.source) if x is not None and x not in known]
        return f"no token has the label {' or '.join(absent)}" if absent else None

    def _known(self, view: View) -> list[tuple[Any, ...]]:
        found = view.once(("labels", self), lambda: self.labelled(view))
        assert not isinstance(found, str)
        return found

    def rows(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        return mass_on_keys(view, _labelled_keys(view, self._known(view), self.target))

    def counted(self, view: View) -> Tensor:
        """See :class:`Measure`."""
        rows = self._known(view)
        some = torch.tensor([bool(keys) for keys in _labelled_keys(view, rows, self.target)], device=view.rows.device)
        counted = view.rows & some.unsqueeze(1)
        if self.source is None:
            return counted
        return counted & _at_queries(view, torch.tensor([[x == self.source for x in row] for row in rows]))


def between_labels(trace: TraceLike, labels: Any, *, real: Any = None) -> DataFrame:
    """How much the tokens of each label attend to those of each label.

    Args:
        trace: with weights.
        labels: see :class:`LabelMass`; keys without one are in no sum.
        real: bool or 0/1, B S: True = a real token, no padding.

    Returns:
        A DataFrame: the columns of the call, ``head``, ``from`` and ``to`` (labels; ``from`` is missing where it is
        all queries that count), ``value``, a mean over the queries of all batch entries with that label,
        and their number ``queries``.

    Raises:
        MeasureError: the labels don't fit a call.
        FieldNotCaptured: the weights were not kept.
    """
    rows = as_label_rows(labels, "labels")
    return label_table(trace, lambda view: piece_labels(view, rows, "labels"), real)


def label_table(trace: TraceLike, labelled: Callable[[View], Labelled], real: Any) -> DataFrame:
    """:func:`between_labels`, of labels that may depend on the call."""
    import pandas as pd

    frames = []
    for view in views_of_heads(trace, real):
        if view.positions is None:
            raise MeasureError(f"labels of {view.where}: queries and keys are not places in one sequence.")
        found = labelled(view)
        if isinstance(found, str):
            raise MeasureError(f"labels of {view.where}: {found}.")
        names = sorted({x for row in found for x in row if x is not None}, key=lambda x: (isinstance(x, str), x))
        number = {name: i for i, name in enumerate(names)}
        ids = torch.tensor([[number.get(x, -1) for x in row] for row in found], device=view.keys.device)
        marks = (ids.unsqueeze(-1) == torch.arange(len(names), device=ids.device)) & view.keys.unsqueeze(-1)
        to = einsum(view.weights, marks.to(view.weights.dtype), "b h t s, b s target -> b h t target")
        sources = torch.stack([_at_queries(view, marks[..., i]) for i in range(len(names))], -1)
        # The first source is all queries, whose label is None.
        sources = torch.cat([torch.ones_like(sources[..., :1]), sources], -1) & view.rows.unsqueeze(-1)
        to = torch.where(view.rows[:, None, :, None], to, 0.0)
        total = einsum(sources.double(), to.double(), "b t source, b h t target -> h source target")
        queries = sources.sum((0, 1))
        values = {"value": total / queries[:, None], "queries": queries[None, :, None].expand_as(total)}
        frames.append(long_table(view, {"head": view.heads, "from": [None, *names], "to": names}, values))
    return pd.concat(frames, ignore_index=True)


def _labelled_keys(view: View, rows: Sequence[tuple[Any, ...]], label: Any) -> list[list[int]]:
    """Of each batch entry the real keys with a label."""
    return [
        [i for i, (x, real) in enumerate(zip(row, own, strict=True)) if x == label and real]
        for row, own in zip(rows, view.keys.tolist(), strict=True)
    ]


def _at_queries(view: View, marks: Tensor) -> Tensor:
    """bool, B T: what B S says of keys, at the places of the queries."""
    b, _, t, s = view.shape
    assert view.positions is not None
    at = view.positions.expand(b, t)
    return marks.to(at.device).gather(1, at.clamp(0, s - 1)) & (at >= 0) & (at < s)
