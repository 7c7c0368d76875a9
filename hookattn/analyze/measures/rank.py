"""Whether a head's weights rise or fall with distance, whatever their size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..call_view import View
from ..reading import Reading
from .base import Measure

# How many entries are sorted together.
_PART = 1 << 20


@dataclass(frozen=True)
class DistanceCorrelation(Measure):
    """Spearman's ρ of ``|i − j|`` and ``w_ij`` over the keys that query i may attend to (Spearman 1904).

    Ties have the mean of their ranks. The mean is over the queries for which it is defined: that have two keys or more
    whose weights, and whose distances, are not all the same. −1: the nearer, the more.
    """

    name: ClassVar[str] = "distance_correlation"
    unit: ClassVar[str] = "correlation"
    positional: ClassVar[bool] = True
    distribution: ClassVar[bool] = False

    def read(self, view: View) -> Reading:
        """See :class:`Measure`."""
        b, h, t, s = view.shape
        weights, pairs, distance = view.weights, view.pairs, view.distance.abs().unsqueeze(1)
        step = max(1, _PART // (b * h * s))
        parts = []
        for start in range(0, t, step):
            rows = slice(start, start + step)
            far = centred_ranks(distance[:, :, rows], pairs[:, :, rows])
            parts.append(_correlation(centred_ranks(weights[:, :, rows], pairs[:, :, rows]), far))
        rho = torch.cat(parts, 2)
        counted = view.rows.unsqueeze(1) & ~rho.isinf()
        return Reading(view.mean(rho, counted), counted.sum(-1), torch.where(counted, rho, torch.nan))


def centred_ranks(values: Tensor, inside: Tensor) -> Tensor:
    """Ranks along the last axis less their mean, 0 outside; all NaN where a value inside is NaN.

    Args:
        values: any shape.
        inside: bool, broadcast with it: what is ranked.

    Returns:
        In the dtype of ``values`` if that is floating, else float32.
    """
    # Hidden entries are sorted to the end as ∞, so that those inside have the ranks 0, 1, … among themselves.
    hidden = ~inside
    values = values if values.is_floating_point() else values.float()
    ordered, order = values.masked_fill(hidden, torch.inf).sort(-1)
    same = torch.zeros_like(ordered, dtype=torch.bool)
    same[..., 1:] = (ordered[..., 1:] == ordered[..., :-1]) & ~ordered[..., 1:].isinf()
    tied = same.clone()
    tied[..., :-1] |= same[..., 1:]
    # Tied entries get the mean of their ranks. Few are tied, so only these are grouped: a group begins where an entry
    # is not the same as the one before.
    at = tied.flatten().nonzero().squeeze(-1)
    place = torch.arange(ordered.shape[-1], dtype=ordered.dtype, device=ordered.device)
    ranked = place.expand(ordered.shape).flatten()
    group = (~same.flatten()[at]).cumsum(0) - 1
    ranked[at] = (torch.bincount(group, ranked[at].double()) / torch.bincount(group))[group].to(ordered.dtype)
    ranks = torch.empty_like(ordered).scatter_(-1, order, ranked.view(ordered.shape))
    ranks -= (inside.sum(-1, keepdim=True) - 1) / 2
    return ranks.masked_fill_(hidden, 0.0) + torch.where(ordered[..., -1:].isnan(), torch.nan, 0.0)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Of what is centred already, along the last axis; ∞ where one of them does not vary."""
    size = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(size == 0, torch.inf, (a * b).sum(-1) / size)
