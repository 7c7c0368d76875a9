"""Starts the GPU kernels of statistics, which sum over scores and weights; or says why the engine has to do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import with_four_axes
from ..score_inputs import ScoreInputs
from .launch import WIDEST, Tile, kernels, next_power_of_2, operands, refusal, start_refusal, strides

# So many sets of keys, at most, are summed up at once: their sums stay in registers.
MOST_SETS = 64
SUMS = ("lse", "max_score", "entropy", "total", "distance")


class Range(NamedTuple):
    """Keys from the first to the last one, both included; from the query's position on if ``relative``."""

    first: int
    last: int
    relative: bool


def kernel_sums(
    problem: ScoreInputs, wanted: Collection[str], ranges: Sequence[Range] = (), sets: Tensor | None = None
) -> dict[str, Tensor] | str:
    """Sums over the keys of each query and over the queries of each key, of one call.

    Args:
        problem: the call, with positions where something of it is counted from them.
        wanted: names of :data:`SUMS`, and ``received``.
        ranges: sets of keys that lie together, and are few: what they get is summed up in a look of its own.
        sets: N S, bfloat16, contiguous, 1 where a key is in a set, else 0; N at most :data:`MOST_SETS`.

    Returns:
        Float32: what is wanted, B H T each: ``lse``, ``max_score``, ``entropy``, ``distance`` as their statistics are
        defined, ``total``, the sum of a row of weights; ``received``: B H S; and with ranges ``parts``: R B H T, with
        sets ``masses``: B H T N. Or a text: why no kernel takes this call.
    """
    q, k, own = problem.q, problem.k, problem.scores
    (b, h, t, d), s = q.shape, k.shape[2]
    of = q if own is None else own
    key = "sum", q.device, of.dtype, d if own is None else 0
    reason = refusal(key, of) or (_product_refusal(q, k) if own is None else None)
    if reason is not None:
        return reason
    level = q.new_empty(b, h, t, dtype=torch.float32)
    made = {name: torch.empty_like(level) for name in SUMS if name in wanted}
    if "received" in wanted:
        made["received"] = level.new_empty(b, h, s)
    if sets is not None:
        made["masses"] = level.new_empty(b, h, t, len(sets))
    if ranges:
        made["parts"] = level.new_empty(len(ranges), b, h, t)
    table = torch.tensor(ranges, dtype=torch.int32, device=q.device) if ranges else None
    places = None
    if "distance" in made or any(r.relative for r in ranges):
        assert problem.positions is not None
        places = problem.positions.expand(b, t)
    given = _call_operands(problem)
    by_query, by_key = _tile_pair(t, key[3], own is None and q.dtype == torch.float32)

    def launch() -> None:
        sums = {name: made.get(name) for name in (*SUMS, "masses", "parts")}
        n = 0 if sets is None else len(sets)
        kernels().sum_rows[(-(-t // by_query.rows) * b * h,)](
            level=level, sets=sets, ranges=table, places=places, R=len(ranges), N=n, T=t, BC=next_power_of_2(n),
            **strides("places", places, "bt"), **sums, **given, **by_query.options(),
        )  # fmt: skip
        if "received" in made:
            spans = _query_blocks(problem, by_key.rows, by_key.columns) if problem.diagonal.hides_any else None
            mine = {name: x for name, x in given.items() if not name.startswith("sinks")}
            kernels().receive_keys[(-(-s // by_key.rows) * b * h,)](
                level=level, spans=spans, received=made["received"], T=t, **mine, **by_key.options()
            )

    return start_refusal(key, of, launch) or made


def _product_refusal(q: Tensor, k: Tensor) -> str | None:
    """Why no kernel forms the product."""
    if q.dtype != k.dtype:
        return f"no kernel multiplies {q.dtype} by {k.dtype}".replace("torch.", "")
    widest = WIDEST // 2 if q.dtype == torch.float32 else WIDEST
    if q.shape[3] > widest:
        return f"no kernel takes {q.dtype} heads wider than {widest}".replace("torch.", "")
    return None


def _call_operands(problem: ScoreInputs) -> dict[str, Any]:
    """The call, by the names of the kernels' parameters."""
    q, k, own = problem.q, problem.k, problem.scores
    mask = None if problem.mask is None else problem.mask.bool()
    hides = problem.diagonal, problem.rows
    if own is None:
        scale = with_four_axes(problem.scale) if isinstance(problem.scale, Tensor) else problem.scale
        given = operands(q, k, scale, problem.softcap, problem.bias, mask, problem.sinks, *hides)
    else:
        # Of the keys only their number counts.
        given = operands(q, own.mT, 1.0, None, None, mask, problem.sinks, *hides)
    return {**given, "product": own, **strides("product", own, "bhts")}


def _tile_pair(t: int, d: int, exact: bool) -> tuple[Tile, Tile]:
    """For sums over the keys, and for sums over the queries.

    By what the compiler makes of them for compute capabilities 8.0 and 9.0: the largest that keep nothing in local
    memory, or next to nothing where two of them then run on a processor, so that one multiplies while the other sums.

    Args:
        t: queries.
        d: how wide they are; 0: nothing is multiplied.
        exact: whether float32 is multiplied, which takes several products on tensor cores.
    """
    if t <= 16:
        return (Tile(16, 16, 1) if exact else Tile(16, 64, 4)), Tile(64, 16, 4)
    if exact:
        one = Tile(128, 32, 8) if d <= 64 else Tile(64, 16, 4)
    else:
        one = Tile(128, 64, 8, 3, 128) if d <= 128 else Tile(64, 64, 4, 2, 168)
    return one, one


def _query_blocks(problem: ScoreInputs, bm: int, bn: int) -> Tensor:
    """4, key blocks, int64: which blocks of ``bn`` queries may see the ``bm`` keys of each key block.

    The first block of which some query may see some of the keys; the first from which on all queries see all of them;
    where the latter end, and where the former do. Made on the device, which nobody waits for. Rows come in any order: a
    search finds the first block from the largest row up to each one, and the last from the least row from each one on.
    """
    t, s = problem.q.shape[2], problem.k.shape[2]
    device = problem.q.device
    rows = torch.arange(t, device=device) if problem.rows is None else problem.rows
    blocks = rows[torch.arange(-(-t // bn) * bn, device=device).clamp_max_(t - 1)].view(-1, bn)  # the last one fills up
    most = blocks.amax(1).cummax(0).values
    least = blocks.amin(1).flip(0).cummin(0).values.flip(0).contiguous()  # of this block and all that follow
    begin = torch.arange(0, s, bm, device=device)
    end = (begin + bm - 1).clamp_max_(s - 1)
    seers = problem.diagonal.seers(begin, end)
    first = torch.searchsorted(most, seers.first)
    left = torch.searchsorted(least, seers.all_first)
    right = last = torch.full_like(begin, len(blocks))
    if seers.all_last is not None:
        right = torch.searchsorted(most, seers.all_last, right=True)
    if seers.last is not None:
        last = torch.searchsorted(least, seers.last, right=True)
    last = torch.maximum(first, last)
    left = torch.minimum(torch.maximum(left, first), last)
    return torch.stack([first, left, torch.minimum(torch.maximum(left, right), last), last])
