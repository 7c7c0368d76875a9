"""The GPU kernel of the certificate: the output that some rows of q, k and v give, against the model's own.

Scores and weights are formed tile by tile and dropped: the output is summed in the same sweep that finds the softmax's
denominator, and divided by it at the end (Dao et al. 2022, FlashAttention).

Letters as in :mod:`hookattn.attention.kernels.rows`; E width of the values.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from .rows import finished_scores, reach, seen_keys


@triton.jit
def _max_abs(x, live):
    """The largest of |x|; infinite if one is NaN, which a maximum on a GPU would pass over: a check must not."""
    x = tl.where(live, tl.abs(x), 0.0)
    return tl.max(tl.max(tl.where(x == x, x, float("inf")), 1))


@triton.jit(do_not_specialize=["offset", "window", "start", "step"])
def check_rows(
    q,  # B H T D
    k,  # B G S D
    v,  # B G S E
    output,  # B H T E
    found,  # 4, row blocks, B·H, float32: the excess of row sums over 1, |scores|, the output's error, |v|
    scale,
    bias,
    mask,
    sinks,
    rows,
    factor,
    softcap,
    offset,
    window,
    start,  # of the N rows that are checked, the first,
    step,  # and how far the next one is
    N,
    H,
    per,
    S,
    D,
    E,
    q_b,
    q_h,
    q_t,
    q_d,
    k_b,
    k_g,
    k_s,
    k_d,
    v_b,
    v_g,
    v_s,
    v_e,
    out_b,
    out_h,
    out_t,
    out_e,
    scale_b,
    scale_h,
    scale_t,
    scale_s,
    bias_b,
    bias_h,
    bias_t,
    bias_s,
    mask_b,
    mask_h,
    mask_t,
    mask_s,
    sinks_b,
    sinks_h,
    sinks_t,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """BM of the rows that are checked, of one head, in one sweep over the keys that any of them sees."""
    blocks = (N + BM - 1) // BM
    z = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = z // H, z % H
    i = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    inside = i < N
    t = start + i.to(tl.int64) * step
    column, d, e = tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BE)

    query = q + b * q_b + h * q_h + t[:, None] * q_t + d[None, :] * q_d
    query = tl.load(query, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    k += b * k_b + (h // per) * k_g
    v += b * v_b + (h // per) * v_g
    if scale is not None:
        scale += b * scale_b + h * scale_h + t * scale_t
    if bias is not None:
        bias += b * bias_b + h * bias_h + t * bias_t
    if mask is not None:
        mask += b * mask_b + h * mask_h + t * mask_t
    first, last, at, alive = 0, S, t, inside
    if CAUSAL or WINDOWED:
        at, first, last, alive = reach(rows, t, inside, offset, window, S, CAUSAL, WINDOWED, BM, BN)
    if mask is not None:  # which rows see any, the sweep says
        alive = i < 0

    top, total = tl.full([BM], -float("inf"), tl.float32), tl.full([BM], 0, tl.float32)
    if sinks is not None:
        top = tl.load(sinks + b * sinks_b + h * sinks_h + t * sinks_t, mask=inside, other=0.0).to(tl.float32)
        total += 1
    # `own` is the total without the sinks' share. Without sinks the two are one, and own / total is NaN if a weight is.
    own, made = tl.full([BM], 0, tl.float32), tl.full([BM, BE], 0, tl.float32)
    score, value = 0.0, 0.0
    for begin in range(first, last, BN):
        cols = begin + column
        s = finished_scores(
            query, k, None, scale, bias, cols, inside, factor, softcap, S, D, k_s, k_d, 1, scale_s, bias_s, BD
        )
        seen = seen_keys(mask, at, cols, inside, window, S, mask_s, CAUSAL, WINDOWED)
        if mask is not None:
            alive |= tl.max(seen.to(tl.int32), 1) > 0
        score = tl.maximum(score, _max_abs(s, seen))
        s = tl.where(seen, s, -float("inf"))
        above = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(above == -float("inf"), 0.0, above)
        less, mass = tl.exp(top - shift), tl.exp(s - shift[:, None])
        values = v + cols.to(tl.int64)[:, None] * v_s + e[None, :] * v_e
        values = tl.load(values, mask=(cols < S)[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)
        value = tl.maximum(value, _max_abs(values, values - values == 0))  # finite ones
        made = made * less[:, None] + tl.dot(mass, values, input_precision="tf32x3")
        total, own, top = total * less + tl.sum(mass, 1), own * less + tl.sum(mass, 1), above

    both = alive[:, None] & (e < E)[None, :]
    real = output + b * out_b + h * out_h + t[:, None] * out_t + e[None, :] * out_e
    real = tl.load(real, mask=both, other=0.0).to(tl.float32)
    beyond = own / total - 1
    if sinks is not None:  # they take their share
        beyond = tl.where(beyond < 0, 0.0, beyond)
    place = found + (tl.program_id(0) % blocks).to(tl.int64) * (tl.num_programs(0) // blocks) + z
    size = tl.num_programs(0).to(tl.int64)
    tl.store(place, _max_abs(beyond[:, None], alive[:, None]))
    tl.store(place + size, score)
    tl.store(place + 2 * size, _max_abs(made / total[:, None] - real, both))
    tl.store(place + 3 * size, value)
