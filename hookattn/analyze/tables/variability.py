"""Whether a head does the same whatever it reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import checks
from ...errors import MeasureError
from ...traces import as_trace
from ..call_view import View, blocks_of
from ..frame import long_table, views

if TYPE_CHECKING:
    from pandas import DataFrame

    from ...traces import TraceLike


def variability(traces: TraceLike | Sequence[TraceLike], *, tokens: int | None = None, real: Any = None) -> DataFrame:
    """How far a head's attention is from its mean over the inputs (Vig & Belinkov 2019).

    ``Σ_x Σ_ij |w_ij(x) − w̄_ij| / (2 Σ_x Σ_ij |w_ij(x)|)`` over the inputs x, w̄ their mean: 0 for a head that goes by
    position alone; towards 1 for one that goes by content.

    Args:
        traces: a trace whose batch entries are the inputs, or several traces of one model, whose batch entries all are.
        tokens: how many tokens of each input are compared at most, the first ones that are no padding; None: as many
            as all inputs have. They take 10.
        real: bool or 0/1, B S: True = a real token, no padding; for several traces one for each, in a list.

    Returns:
        A pandas DataFrame with the columns of a call, ``head``, ``variability`` (NaN where the inputs give nothing to
        these keys), and ``examples``, the number of inputs.

    Raises:
        MeasureError: fewer than two inputs, or traces that have other calls or heads, or an input of padding alone.
        SelectionError: ``tokens`` is no positive int.
        FieldNotCaptured: the weights were not kept.
    """
    import pandas as pd

    many = isinstance(traces, Sequence) and not isinstance(traces, (str, bytes))
    given: Sequence[Any] = traces if many else (traces,)  # type: ignore[assignment]
    several = [as_trace(trace, "traces") for trace in given]
    tokens = None if tokens is None else checks.whole("tokens", tokens, 1)
    if many and real is not None and not (isinstance(real, Iterable) and not isinstance(real, (str, bytes))):
        raise checks.wrong("real", real, "one for each trace, in a list, or None", MeasureError)
    reals = list(real) if many and real is not None else [real] * len(several)
    if len(reals) != len(several):
        raise MeasureError(f"real= has {len(reals)} entries for {len(several)} traces; expected one for each, or None.")
    seen = [list(views(trace, own)) for trace, own in zip(several, reals, strict=True)]
    if not seen or len({len(own) for own in seen}) > 1:
        raise MeasureError(
            f"variability is over traces of the same calls; these have {[len(own) for own in seen]} calls."
        )
    return pd.concat([_variability_table(calls, tokens) for calls in zip(*seen, strict=True)], ignore_index=True)


def _variability_table(calls: Sequence[View], tokens: int | None) -> DataFrame:
    first = calls[0]
    for view in calls[1:]:
        if view.call.site.path != first.call.site.path or tuple(view.heads) != tuple(first.heads):
            raise MeasureError(
                f"variability is over traces of the same calls: {first.where} with heads {list(first.heads)} meets "
                f"{view.where} with heads {list(view.heads)}."
            )
    n = sum(view.shape[0] for view in calls)
    if n < 2:
        raise MeasureError(
            f"variability of {first.where}: it has one input; expected two or more, as a batch or as several traces."
        )
    rows, keys = (_compared_length(own, tokens, first) for own in ([v.rows for v in calls], [v.keys for v in calls]))
    blocks = blocks_of(calls, 4 * len(calls))  # in float64, together, and how far they are apart
    apart = torch.cat([_apart([_first_counting(view.part(heads), rows, keys) for view in calls]) for heads in blocks])
    return long_table(
        first, {"head": first.heads}, {"variability": apart, "examples": torch.full_like(apart, n).long()}
    )


def _apart(weights: Sequence[Tensor]) -> Tensor:
    """H: how far heads are from their mean, of b H rows keys for each trace."""
    w = torch.cat(list(weights)).double()
    return (w - w.mean(0)).abs().sum((0, 2, 3)) / (2 * w.abs().sum((0, 2, 3)))


def _compared_length(counting: Sequence[Tensor], tokens: int | None, view: View) -> int:
    """How many positions are compared: of what counts, B T or B S for each trace."""
    least = min(int(own.sum(-1).min()) for own in counting)
    if least == 0:
        raise MeasureError(f"variability of {view.where}: an input has nothing but padding.")
    return least if tokens is None else min(least, tokens)


def _first_counting(view: View, rows: int, keys: int) -> Tensor:
    """B H rows keys: the first ones that count."""
    if bool(view.rows[:, :rows].all() & view.keys[:, :keys].all()):
        return view.weights[:, :, :rows, :keys]
    b, h, _, s = view.shape
    # A stable sort of flags puts the positions that count first, each in its order, wherever padding is.
    at = [torch.argsort(own.byte(), dim=-1, descending=True, stable=True) for own in (view.rows, view.keys)]
    part = view.weights.gather(2, at[0][:, None, :rows, None].expand(b, h, rows, s))
    return part.gather(3, at[1][:, None, None, :keys].expand(b, h, rows, keys))
