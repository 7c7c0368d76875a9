"""Which columns of one matrix are the columns of another, told by their values over many tokens."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ...calls.certificate import tolerance as tolerance_of

LEAST = 8
"""Tokens below which a fit proves nothing."""
_MARGIN = 4.0  # the next best head has to fit this much worse
_CHUNK = 256  # target columns that are compared with all source columns in one product


@dataclass(frozen=True, slots=True)
class Match:
    """``target[:, i] = factor[i] · source[:, columns[i]] + offset[i]``.

    Attributes:
        basis: ``equal``: bit for bit; ``affine``: to rounding; ``norms``: each head's columns have its norm at every
            token, times one factor.
        columns: m, int64.
        factor: m, or None: 1.
        offset: m, or None: 0.
    """

    basis: str
    columns: Tensor
    factor: Tensor | None = None
    offset: Tensor | None = None


def equal(target: Tensor, source: Tensor, weight: Tensor) -> Match | None:
    """Columns that are the same, bit for bit.

    Args:
        target: n m.
        source: n N.
        weight: C N: the weights of each column of ``source``; columns that are the same may stand for each other only
            where these are the same too.
    """
    if not bool((source == target[:, :1]).all(0).any()):  # most products are told apart by one column
        return None
    places: dict[bytes, list[int]] = defaultdict(list)
    for i, key in enumerate(_column_keys(source)):
        places[key].append(i)
    columns = []
    for key in _column_keys(target):
        found = places.get(key)
        if found is None or any(not torch.equal(weight[:, i], weight[:, found[0]]) for i in found[1:]):
            return None
        columns.append(found[0])
    return Match("equal", torch.tensor(columns, device=source.device))


def _column_keys(x: Tensor) -> list[bytes]:
    rows = (x.double() + 0.0).t().contiguous().cpu().numpy()  # adding 0 makes −0 the same as 0
    return [row.tobytes() for row in rows]


def affine(target: Tensor, source: Tensor, weight: Tensor, dtype: torch.dtype) -> Match | None:
    """Columns that are the same but for a factor and an offset each, constant over the tokens, to rounding.

    Args:
        target: n m.
        source: n N.
        weight: C N, as in :func:`equal`.
        dtype: that the values were computed in.
    """
    if len(target) < LEAST:
        return None
    t, y, tolerance = target.double(), source.double(), tolerance_of(dtype)
    tc, yc = t - t.mean(0), y - y.mean(0)
    size, sizes = _norm_of_varying(tc, t), _norm_of_varying(yc, y)
    if not bool(size.isfinite().all()):
        return None
    # For each column the source column with the largest correlation in absolute value: an affine map leaves it at 1.
    # float32 is enough to choose by; the choice is then held against the tolerance in float64.
    unit = (yc / sizes).float()
    wanted = (tc / size).float().t()
    parts = [wanted[start : start + _CHUNK] @ unit for start in range(0, len(wanted), _CHUNK)]
    columns, next_best = torch.cat([p.abs().topk(min(2, p.shape[1])).indices for p in parts]).t()[[0, -1]]

    def fit(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factor = (tc * yc[:, at]).sum(0) / sizes[at].square()
        offset = t.mean(0) - factor * y.mean(0)[at]
        good = (t - factor * y[:, at] - offset).abs().amax(0) <= tolerance * t.abs().amax(0)
        return factor, offset, good

    # A second column that fits as well is a rival only where its weights are others: tied or repeated columns are not.
    factor, offset, good = fit(columns)
    other, _, also = fit(next_best)
    also &= next_best != columns
    apart = (weight[:, next_best] * other - weight[:, columns] * factor).abs().amax(0)
    rival = apart > tolerance * weight.abs().amax()
    if not bool(good.all()) or bool((also & rival).any()):
        return None
    factor = _ones_if_rounded(factor, tolerance)
    offset = (t - factor * y[:, columns]).mean(0)
    offset = torch.where(offset.abs() <= tolerance * t.abs().amax(0), 0.0, offset)
    return Match("affine", columns, _none_if_all(factor, 1.0), _none_if_all(offset, 0.0))


def _norm_of_varying(centred: Tensor, x: Tensor) -> Tensor:
    """The norm of each column; ∞ for one that does not change from token to token, which tells nothing."""
    norm = centred.norm(dim=0)
    return torch.where(norm > 1e-6 * x.norm(dim=0).clamp_min(torch.finfo(x.dtype).tiny), norm, torch.inf)


def _ones_if_rounded(factor: Tensor, tolerance: float) -> Tensor:
    """Exactly 1 where all are, to rounding; their mean is known better than each."""
    # The error of a mean of n is √n times smaller than that of one, so the mean has to be closer to 1 by that.
    off = (factor - 1).abs().max(), (factor.mean() - 1).abs() * len(factor) ** 0.5
    return torch.ones_like(factor) if float(max(off)) <= tolerance else factor


def _none_if_all(x: Tensor, value: float) -> Tensor | None:
    return None if bool((x == value).all()) else x


def norms(target: Tensor, source: Tensor, heads: int, dtype: torch.dtype) -> Match | None:
    """For each head the neighbouring columns that have its norm at every token, up to one factor: rotary positions.

    Args:
        target: n m, of ``heads`` equal parts.
        source: n N.
        heads: how many.
        dtype: that the values were computed in.
    """
    n, m = target.shape
    d, wide = m // heads, source.shape[1]
    if n < LEAST or wide < m:
        return None
    # A head begins at a multiple of its width, but for what a packed projection has in front of it; gcd covers both.
    starts = torch.arange(0, wide - d + 1, math.gcd(d, wide), device=source.device)
    # Norms of all windows of d columns at once, as differences of running sums of squares.
    squares = torch.nn.functional.pad(source.double().square().cumsum(1), (1, 0))
    have = (squares[:, starts + d] - squares[:, starts]).clamp_min(0).sqrt()
    want = rearrange(target.double(), "n (h d) -> n h d", h=heads).norm(dim=2)
    have_size, want_size = have.norm(dim=0), want.norm(dim=0)
    # Each head is compared by its norms over the tokens, as a unit vector, so that a constant factor cancels out.
    distance = torch.cdist((want / want_size).t(), (have / have_size).t(), compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance.nan_to_num(torch.inf)
    best = distance.topk(min(2, len(starts)), largest=False)
    at = best.indices[:, 0]
    # One norm is the root of a sum over a head: its rounding averages out.
    bound = tolerance_of(dtype) / 4
    clear = best.values[:, 0] <= bound
    if best.values.shape[1] > 1:
        clear &= best.values[:, 1] > _MARGIN * best.values[:, 0].clamp_min(torch.finfo(torch.float32).eps)
    factor = want_size / have_size[at]
    if not bool(clear.all()) or len(set(at.tolist())) != heads or float(factor.max() / factor.min()) > 1 + 4 * bound:
        return None
    columns = (starts[at].unsqueeze(1) + torch.arange(d, device=source.device)).flatten()
    factor = _ones_if_rounded(factor, 4 * bound)
    return Match("norms", columns, _none_if_all(factor.repeat_interleave(d), 1.0))
