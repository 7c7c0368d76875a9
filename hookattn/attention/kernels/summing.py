"""The GPU kernels of statistics that are a number for each query: one sweep over the keys, nothing written but sums.

Letters as in :mod:`.rows`; N sets of keys, R ranges of keys. The softmax is the online one of :mod:`.rows`: all sums
are relative to the largest score so far. Scores are counted in units of ln 2: exp s is then 2 to their power, which is
one instruction on a GPU.

The keys of a block of rows fall into three parts: those at the left edge, that a window hides from some of the rows;
those that all rows see; those at the right edge, around the diagonal. Only at the edges a mask is made. Where the model
gave a mask, everything is edge.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from .rows import finished_scores, reach, reach_of_all, seen_keys

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# What a hidden score is replaced by: its power is 0, and 0 times it is no NaN as for −∞.
HIDDEN = tl.constexpr(-1e30)


@triton.jit
def scores_in_log2(
    query, k, product, scale, bias, cols, inside, factor, softcap, S, D, k_s, k_d, product_s, scale_s, bias_s,
    BD: tl.constexpr,
):  # fmt: skip
    """BM BN: finished scores ÷ ln 2; see :func:`hookattn.attention.kernels.rows.finished_scores`."""
    if product is None and softcap is None and bias is None:  # one multiplication does both
        x = finished_scores(
            query, k, product, scale, bias, cols, inside, factor * LOG2E, softcap, S, D, k_s, k_d, product_s, scale_s,
            bias_s, BD,
        )  # fmt: skip
    else:
        x = LOG2E * finished_scores(
            query, k, product, scale, bias, cols, inside, factor, softcap, S, D, k_s, k_d, product_s, scale_s,
            bias_s, BD,
        )  # fmt: skip
    return x


@triton.jit
def _sweep(
    top, total, moment, away, made, first, last, query, k, product, scale, bias, mask, sets, places, at, inside,
    factor, softcap, window, S, D, N, k_s, k_d, product_s, scale_s, bias_s, mask_s,
    MOMENT: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Some more keys in the sums of BM rows; EDGE: there may be some that some row doesn't see, or comes before."""
    for begin in range(first, last, BN):
        cols = begin + tl.arange(0, BN)
        x = scores_in_log2(
            query, k, product, scale, bias, cols, inside, factor, softcap, S, D, k_s, k_d, product_s, scale_s, bias_s,
            BD,
        )  # fmt: skip
        if EDGE:
            x = tl.where(seen_keys(mask, at, cols, inside, window, S, mask_s, CAUSAL, WINDOWED), x, HIDDEN)
        above = tl.maximum(top, tl.max(x, 1))
        less = tl.exp2(top - above)
        x -= above[:, None]
        mass = tl.exp2(x)
        more = tl.sum(mass, 1)
        if MOMENT:  # about the largest score so far: nothing cancels where scores are large
            moment = (moment + (top - above) * total) * less + tl.sum(mass * x, 1)
        if places is not None:
            if EDGE:
                gap = tl.sum(mass * tl.abs(places[:, None] - cols.to(tl.float32)[None, :]), 1)
            else:  # linear in the key; from the tile's first one on, so that nothing cancels but what is small
                gap = (places - begin) * more - tl.sum(mass * tl.arange(0, BN).to(tl.float32)[None, :], 1)
            away = away * less + gap
        if sets is not None:
            n = tl.arange(0, BC)
            marks = sets + n.to(tl.int64)[None, :] * S + cols[:, None]
            marks = tl.load(marks, mask=(cols < S)[:, None] & (n < N)[None, :], other=0.0)
            # Marks are 0 and 1; of the masses two bfloat16 keep 16 digits, and tensor cores multiply them.
            high = (mass.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
            made = tl.dot(high.to(tl.bfloat16), marks, made * less[:, None])
            made = tl.dot((mass - high).to(tl.bfloat16), marks, made)
        total = total * less + more
        top = above
    return top, total, moment, away, made


@triton.jit(do_not_specialize=["offset", "window"])
def sum_rows(
    q,  # B H T D
    k,  # B G S D
    product,  # B H T S: finished scores, instead of q and k; or None
    sets,  # N S, contiguous, bfloat16: 1 for a key in the set; or None
    ranges,  # R 3, int32: the first key and the last, and 1 if they are counted from the query's position; or None
    places,  # B T, int64: the key position of each query; or None
    level,  # B H T, contiguous, float32, as all that follow: log₂ of the denominator; always written
    lse,  # or None, as all that follow
    max_score,
    entropy,
    total,  # sum of the weights
    distance,  # mean distance; with places
    masses,  # B H T N; with sets
    parts,  # R B H T; with ranges
    scale,  # to B H T S, or None
    bias,
    mask,  # int8
    sinks,  # to B H T
    rows,  # T: which queries of the whole call these are; None: all, in order
    factor,
    softcap,  # or None
    offset,
    window,
    H,
    per,  # query heads of one key head
    T,
    S,
    D,
    N,
    R,
    q_b, q_h, q_t, q_d, k_b, k_g, k_s, k_d, product_b, product_h, product_t, product_s, places_b, places_t,
    scale_b, scale_h, scale_t, scale_s, bias_b, bias_h, bias_t, bias_s, mask_b, mask_h, mask_t, mask_s,
    sinks_b, sinks_h, sinks_t,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """BM rows of one head, in one sweep over the keys that any of them sees."""
    blocks = (T + BM - 1) // BM
    z = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = z // H, z % H
    t = (blocks - 1 - tl.program_id(0) % blocks) * BM + tl.arange(0, BM)  # those with most keys to see come first
    inside = t < T
    t = t.to(tl.int64)

    query = None
    if product is None:
        d = tl.arange(0, BD)
        query = q + b * q_b + h * q_h + t[:, None] * q_t + d[None, :] * q_d
        query = tl.load(query, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        k += b * k_b + (h // per) * k_g
    else:
        product += b * product_b + h * product_h + t * product_t
    if scale is not None:
        scale += b * scale_b + h * scale_h + t * scale_t
    if bias is not None:
        bias += b * bias_b + h * bias_h + t * bias_t
    if mask is not None:
        mask += b * mask_b + h * mask_h + t * mask_t
    place, afar = None, None
    if places is not None:
        place = tl.load(places + b * places_b + t * places_t, mask=inside, other=0).to(tl.int32)
        if distance is not None:
            afar = place.to(tl.float32)

    first, last, at = 0, S, t
    if CAUSAL or WINDOWED:
        at, first, last, _ = reach(rows, t, inside, offset, window, S, CAUSAL, WINDOWED, BM, BN)
    left, right = last, last
    if mask is None:
        left, right = reach_of_all(at, inside, first, last, window, S, CAUSAL, WINDOWED, BN)
        if afar is not None:  # distances are linear in the key up to the query's own position: the middle ends there
            ends = (tl.maximum(tl.min(tl.where(inside, afar, S)), -1) + 1).to(tl.int32) // BN * BN
            right = tl.maximum(left, tl.minimum(right, ends))

    top, amount = tl.full([BM], HIDDEN, tl.float32), tl.full([BM], 0, tl.float32)
    moment, away, made = amount, amount, tl.full([BM, BC], 0, tl.float32)
    if WINDOWED or mask is not None:
        top, amount, moment, away, made = _sweep(
            top, amount, moment, away, made, first, left, query, k, product, scale, bias, mask, sets, afar, at, inside,
            factor, softcap, window, S, D, N, k_s, k_d, product_s, scale_s, bias_s, mask_s,
            entropy is not None, True, CAUSAL, WINDOWED, BN, BD, BC,
        )  # fmt: skip
    if mask is None:
        top, amount, moment, away, made = _sweep(
            top, amount, moment, away, made, left, right, query, k, product, scale, bias, mask, sets, afar, at, inside,
            factor, softcap, window, S, D, N, k_s, k_d, product_s, scale_s, bias_s, mask_s,
            entropy is not None, False, CAUSAL, WINDOWED, BN, BD, BC,
        )  # fmt: skip
        top, amount, moment, away, made = _sweep(
            top, amount, moment, away, made, right, last, query, k, product, scale, bias, mask, sets, afar, at, inside,
            factor, softcap, window, S, D, N, k_s, k_d, product_s, scale_s, bias_s, mask_s,
            entropy is not None, True, CAUSAL, WINDOWED, BN, BD, BC,
        )  # fmt: skip

    # A row is dead that has seen no key. A maximum on a GPU passes over NaN, the sum does not: such a row is not dead.
    dead = (top <= HIDDEN / 2) & (amount == amount)
    log = tl.where(dead, -float("inf"), top + tl.log2(amount))
    if sinks is not None:  # one more column: log₂(2^log + 2^sink), from the larger one, so that nothing overflows
        sink = tl.load(sinks + b * sinks_b + h * sinks_h + t * sinks_t, mask=inside, other=0.0).to(tl.float32) * LOG2E
        more = log > sink
        larger, smaller = tl.where(more, log, sink), tl.where(more, sink, log)
        joined = larger + tl.log2(1 + tl.exp2(smaller - larger))
        log = tl.where(larger == -float("inf"), larger, joined)
    share = tl.where(dead, 0.0, tl.exp2(top - log))
    row = z * T + t
    tl.store(level + row, log, mask=inside)
    if lse is not None:
        tl.store(lse + row, log * LN2, mask=inside)
    if max_score is not None:
        largest = tl.where((amount == amount) | (top == float("inf")), top * LN2, float("nan"))
        tl.store(max_score + row, tl.where(dead, -float("inf"), largest), mask=inside)
    if total is not None:
        tl.store(total + row, amount * share, mask=inside)
    if entropy is not None:
        spread = tl.where(dead, 0.0, LN2 * (amount * share * (log - top) - moment * share))
        tl.store(entropy + row, tl.where(spread < 0, 0.0, spread), mask=inside)
    if distance is not None:
        tl.store(distance + row, tl.where(dead, 0.0, away / amount), mask=inside)
    if masses is not None:
        n = tl.arange(0, BC)
        made = tl.where(dead[:, None], 0.0, made * share[:, None])
        tl.store(masses + row[:, None] * N + n[None, :], made, mask=inside[:, None] & (n < N)[None, :])
    if ranges is not None:  # short ones, looked at again: each row's own part of them
        size = tl.num_programs(0).to(tl.int64) // blocks * T
        for r in range(0, R):
            low = tl.load(ranges + 3 * r) + tl.full([BM], 0, tl.int32)
            high = tl.load(ranges + 3 * r + 1) + tl.full([BM], 0, tl.int32)
            if place is not None:
                low += place * tl.load(ranges + 3 * r + 2)
                high += place * tl.load(ranges + 3 * r + 2)
            start = tl.maximum(tl.min(tl.where(inside, low, S)), first) // BN * BN
            stop = tl.minimum(tl.max(tl.where(inside, high, -1)) + 1, last)
            part = tl.where(log == log, 0.0, log)
            for begin in range(start, stop, BN):
                cols = begin + tl.arange(0, BN)
                x = scores_in_log2(
                    query, k, product, scale, bias, cols, inside, factor, softcap, S, D, k_s, k_d, product_s, scale_s,
                    bias_s, BD,
                )  # fmt: skip
                seen = seen_keys(mask, at, cols, inside, window, S, mask_s, CAUSAL, WINDOWED)
                seen &= (cols[None, :] >= low[:, None]) & (cols[None, :] <= high[:, None])
                part += tl.sum(tl.where(seen, tl.exp2(x - log[:, None]), 0.0), 1)
            tl.store(parts + r * size + row, part, mask=inside)
