"""How many dimensions a head's scores have."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import checks
from ..call_view import View
from ..frame import long_table, views, views_of_heads

if TYPE_CHECKING:
    from pandas import DataFrame

    from ...traces import TraceLike


def score_rank(trace: TraceLike, *, masked: bool = False, energy: float = 0.9, real: Any = None) -> DataFrame:
    """The ranks of each head's score matrix, T by S, without rows and keys that are padding.

    Args:
        trace: with scores, or q and k.
        masked: whether scores that the mask hides are 0, instead of what they are.
        energy: the share of ``Σ σ²`` that ``energy_rank`` is for.
        real: bool or 0/1, B S: True = a real token, no padding.

    Returns:
        A pandas DataFrame with the columns of a call, ``head``, ``example``, and

        - ``effective_rank`` = ``exp(−Σ p ln p)``, ``p = σ / Σ σ`` (Roy & Vetterli 2007);
        - ``energy_rank``, how many σ have ``energy`` of ``Σ σ²`` (0.9: the rank for 90 % of the energy);
        - ``rank``, how many σ are above the largest times max(T, S) times the epsilon of float32 (of float64 for a
          model in that); scores that were rounded to less have the rank of their rounding;
        - ``bound``, D, which no rank is above where scores are nothing but a multiple of q·k; NaN where they are more
          (a bias, a soft-cap, a mask), or q was not kept;
        - ``largest``, the largest σ.

        All NaN where a score is not finite, or all are 0.

    Raises:
        SelectionError: ``energy`` is no share.
        FieldNotCaptured: the scores, or for ``masked`` the mask, were not kept.
        MeasureError: the trace has no calls.
    """
    import pandas as pd

    checks.flag("masked", masked)
    energy = checks.number("energy", energy, "a share above 0, up to 1", lambda x: 0 < x <= 1)
    return pd.concat([_rank_table(view, masked, energy) for view in views_of_heads(trace, real)], ignore_index=True)


def singular_values(trace: TraceLike, *, masked: bool = False, real: Any = None) -> list[Tensor]:
    """σ of each head's score matrix, largest first: B H K for each call, float64; K is at most T, S, or D.

    Args:
        trace, masked, real: as in :func:`score_rank`.

    Raises:
        FieldNotCaptured, MeasureError: see :func:`score_rank`.
    """
    checks.flag("masked", masked)
    return [torch.cat([_singular_values(part, masked) for part in view.parts()], 1) for view in views(trace, real)]


def _rank_table(view: View, masked: bool, energy: float) -> DataFrame:
    b, _, t, s = view.shape
    sigma = _singular_values(view, masked)
    largest = sigma[..., 0].masked_fill(sigma[..., 0] == 0, torch.nan)
    share = sigma / sigma.sum(-1, keepdim=True)
    squares = sigma.square().cumsum(-1)
    # Rounding must not ask for one more where the share is met exactly.
    enough = squares >= energy * (1 - 1e-12) * squares[..., -1:]
    noise = max(t, s) * torch.finfo(torch.float64 if view.call.dtype == torch.float64 else torch.float32).eps
    bound = float(view.tensor("q").shape[-1]) if _scores_are_products(view) and not masked else math.nan
    made = {
        "effective_rank": torch.special.entr(share).sum(-1).exp(),
        "energy_rank": (~enough).sum(-1) + 1.0,
        "rank": (sigma > noise * sigma[..., :1]).sum(-1).double(),
        "bound": torch.full_like(largest, bound),
    }
    made = {name: torch.where(largest.isnan(), torch.nan, value) for name, value in made.items()}
    values = {name: value.t() for name, value in (made | {"largest": largest}).items()}
    return long_table(view, {"head": view.heads, "example": range(b)}, values)


def _scores_are_products(view: View) -> bool:
    """Whether the scores are known to be a multiple of q·k."""
    call = view.call
    kept = "q" in call.fields and "k" in call.fields and call.has("bias")
    plain = call.softcap is None and not call.own_scores and isinstance(call.scale, (int, float))
    return kept and plain and call.get("bias") is None


def _singular_values(view: View, masked: bool) -> Tensor:
    """B H K, float64."""
    rows, keys = view.rows[:, None, :, None], view.keys[:, None, :, None]
    if not masked and _scores_are_products(view) and view.tensor("q").shape[-1] < min(view.shape[2:]):
        # σ of q·kᵀ are those of the product of their triangular factors, D by D.
        assert isinstance(view.call.scale, (int, float))
        q, k = view.tensor("q").double() * view.call.scale, view.per_head("k").double()
        q, k = (torch.where(own, x, 0.0) for own, x in ((rows, q), (keys, k)))
        # A decomposition of NaN is an error for the whole batch, so that such heads are taken as 0 and marked after.
        bad = ~(q.isfinite().all(-1).all(-1) & k.isfinite().all(-1).all(-1))
        q, k = (torch.linalg.qr(x.masked_fill(bad[..., None, None], 0.0), "r").R for x in (q, k))
        scores = q @ k.mT
    else:
        inside = rows & keys.mT
        if masked:
            inside = inside & view.tensor("mask")
        scores = torch.where(inside, view.tensor("scores").double(), 0.0)
        bad = ~scores.isfinite().all(-1).all(-1)
        scores = scores.masked_fill(bad[..., None, None], 0.0)
    sigma: Tensor = torch.linalg.svdvals(scores)
    return sigma.masked_fill(bad.unsqueeze(-1), torch.nan)
