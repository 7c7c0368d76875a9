"""The GPU kernel that writes scores and weights, in Triton's language; and the parts that all kernels share.

Letters: B batch, H query heads, G key heads, T queries, S keys, D width; BM BN: rows and columns of a tile, BD: D
rounded up to a power of 2, as Triton's ranges are. What is there by broadcasting has a stride of 0. What may grow
beyond 2³¹ elements is counted in 64 bits.

The softmax takes one sweep (Milakov and Gimelshein 2018, Online normalizer calculation for softmax; in tiles as Dao et
al. 2022, FlashAttention): each row keeps the largest score so far and the sum of exponentials relative to it. A tile
with a larger score first scales that sum down. No row of scores has to be held for it, however many keys there are.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """tanh x to float32's rounding.

    1 − 2 / (e²ˣ + 1) is 1 where e²ˣ overflows, and not the NaN of (e²ˣ − 1) / (e²ˣ + 1). Near 0 it cancels: there the
    first terms of the Taylor series are used; what is left out is below 2⁻²⁴ of x where |x| < 0.25.
    """
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def finished_scores(
    query,
    k,
    product,
    scale,
    bias,
    cols,
    inside,
    factor,
    softcap,
    S,
    D,
    k_s,
    k_d,
    product_s,
    scale_s,
    bias_s,
    BD: tl.constexpr,
):
    """BM BN: scale·q·kᵀ, soft-capped, plus bias, for some keys; all pointers stand at the rows.

    Nothing in it but the names tells queries from keys: rows may be keys, and columns queries.
    """
    there, far = cols < S, cols.to(tl.int64)[None, :]
    both = inside[:, None] & there[None, :]
    if product is None:
        d = tl.arange(0, BD)
        keys = k + far * k_s + d[:, None] * k_d
        keys = tl.load(keys, mask=there[None, :] & (d < D)[:, None], other=0.0)
        # float32 as sums of what tensor cores multiply: three products of tf32 keep its precision, one would not.
        s = tl.dot(query, keys, input_precision="tf32x3") * factor
    else:
        s = tl.load(product[:, None] + far * product_s, mask=both, other=0.0).to(tl.float32)
    if scale is not None:
        s *= tl.load(scale[:, None] + far * scale_s, mask=both, other=0.0).to(tl.float32)
    if softcap is not None:
        s = _tanh(s / softcap) * softcap
    if bias is not None:
        s += tl.load(bias[:, None] + far * bias_s, mask=both, other=0.0).to(tl.float32)
    return s


@triton.jit
def unmasked(mask, cols, inside, S, mask_s):
    """BM BN: which pairs of row and column are there, and not hidden by the mask."""
    seen = inside[:, None] & (cols < S)[None, :]
    if mask is not None:
        seen = tl.load(mask[:, None] + cols.to(tl.int64)[None, :] * mask_s, mask=seen, other=0) != 0
    return seen


@triton.jit
def allows(at, key, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Which keys a query sees for all that the kernel hides by itself.

    As :meth:`hookattn.attention.Diagonal.allows`; ``at`` is the query's place on the diagonal. Either may be the row.
    """
    back = at - key
    if CAUSAL:
        seen = back >= 0
    else:
        seen = back > -window
    if WINDOWED:
        seen &= back < window
    return seen


@triton.jit
def seen_keys(mask, at, cols, inside, window, S, mask_s, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """BM BN: which of some keys each row may attend to."""
    seen = unmasked(mask, cols, inside, S, mask_s)
    if CAUSAL or WINDOWED:
        seen &= allows(at[:, None], cols[None, :], window, CAUSAL, WINDOWED)
    return seen


@triton.jit
def reach(
    rows, t, inside, offset, window, S, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Where each row is on the diagonal; from where to where there are keys that some row sees; which rows see any.

    ``some`` of :meth:`hookattn.attention.Diagonal.reach`, but begun where a tile begins, so that sweeps over the same
    keys are in step, and without a key where there is none.
    """
    at = t
    if rows is not None:
        at = tl.load(rows + t, mask=inside, other=0)
    at = (at + offset).to(tl.int32)
    least, most = tl.min(tl.where(inside, at, 2**31 - 1)), tl.max(tl.where(inside, at, -(2**31)))
    first, last = 0, S
    low, high = tl.full([BM], 0, tl.int32), tl.full([BM], 0, tl.int32) + (S - 1)
    if WINDOWED:
        low, first = tl.maximum(at - window + 1, 0), tl.maximum(least - window + 1, 0) // BN * BN
        if not CAUSAL:
            high, last = tl.minimum(at + window - 1, S - 1), tl.maximum(tl.minimum(most + window, S), 0)
    if CAUSAL:
        high, last = tl.minimum(at, S - 1), tl.maximum(tl.minimum(most + 1, S), 0)
    return at, tl.minimum(first, last), last, inside & (low <= high)


@triton.jit
def reach_of_all(at, inside, first, last, window, S, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BN: tl.constexpr):
    """Of the keys from first to last: from where to where every row sees all of them, in whole tiles.

    ``all`` of :meth:`hookattn.attention.Diagonal.reach`. No mask has to be made for these tiles.
    """
    least, most = tl.min(tl.where(inside, at, 2**31 - 1)), tl.max(tl.where(inside, at, -(2**31)))
    left, right = first, S // BN * BN
    if WINDOWED:
        left = tl.minimum(tl.maximum(first, (tl.maximum(most - window + 1, 0) + BN - 1) // BN * BN), last)
        if not CAUSAL:
            right = tl.minimum(right, tl.maximum(least + window, 0) // BN * BN)
    if CAUSAL:
        right = tl.minimum(right, tl.maximum(least + 1, 0) // BN * BN)
    return left, tl.maximum(left, right)


@triton.jit(do_not_specialize=["offset", "window"])
def derive_rows(
    q,  # B H T D
    k,  # B G S D
    product,  # B H T S, contiguous, float32: scale·q·kᵀ if it was formed before; or None
    scores,  # B H T S, contiguous: to be written; or None
    weights,  # the same; may both be the memory of product
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
    q_b,
    q_h,
    q_t,
    q_d,
    k_b,
    k_g,
    k_s,
    k_d,
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
):
    """BM rows of one head: one sweep over the keys for the softmax's denominator, one that writes."""
    blocks = (T + BM - 1) // BM
    z = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = z // H, z % H
    t = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    inside = t < T
    t = t.to(tl.int64)
    column = tl.arange(0, BN)

    query = None
    if product is None:
        d = tl.arange(0, BD)
        query = q + b * q_b + h * q_h + t[:, None] * q_t + d[None, :] * q_d
        query = tl.load(query, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        k += b * k_b + (h // per) * k_g
    else:
        product += (z * T + t) * S
    if scale is not None:
        scale += b * scale_b + h * scale_h + t * scale_t
    if bias is not None:
        bias += b * bias_b + h * bias_h + t * bias_t
    if mask is not None:
        mask += b * mask_b + h * mask_h + t * mask_t
    if scores is not None:
        scores += (z * T + t) * S
    if weights is not None:
        weights += (z * T + t) * S

    # Of the keys from first to last some row sees some; `alive` are the rows that see any. Which do under a mask, only
    # the sweep can say: it begins with none.
    first, last, at, alive = 0, S, t, inside
    if CAUSAL or WINDOWED:
        at, first, last, alive = reach(rows, t, inside, offset, window, S, CAUSAL, WINDOWED, BM, BN)
    if mask is not None:
        alive = t < 0

    top, total = tl.full([BM], -float("inf"), tl.float32), tl.full([BM], 0, tl.float32)
    if sinks is not None:  # one more column
        top = tl.load(sinks + b * sinks_b + h * sinks_h + t * sinks_t, mask=inside, other=0.0).to(tl.float32)
        total += 1
    if weights is not None:
        for start in range(first, last, BN):
            cols = start + column
            s = finished_scores(
                query, k, product, scale, bias, cols, inside, factor, softcap, S, D, k_s, k_d, 1, scale_s, bias_s, BD
            )
            seen = seen_keys(mask, at, cols, inside, window, S, mask_s, CAUSAL, WINDOWED)
            if mask is not None:
                alive |= tl.max(seen.to(tl.int32), 1) > 0
            s = tl.where(seen, s, -float("inf"))
            above = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(above == -float("inf"), 0.0, above)  # a row that has seen nothing: −∞ − −∞ is no number
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
            top = above
    shift = tl.where(top == -float("inf"), 0.0, top)
    inverse = 1 / total  # an infinity for a row without keys, which is not used

    if scores is None:  # scores are written for all keys, weights are 0 where no row sees any: nothing to compute there
        for start in range(0, first, BN):
            _write_zeros(weights, start + column, inside, S, BM, BN)
        for start in range((last + BN - 1) // BN * BN, S, BN):
            _write_zeros(weights, start + column, inside, S, BM, BN)
    else:
        first, last = 0, S
    for start in range(first, last, BN):
        cols = start + column
        both = inside[:, None] & (cols < S)[None, :]
        s = finished_scores(
            query, k, product, scale, bias, cols, inside, factor, softcap, S, D, k_s, k_d, 1, scale_s, bias_s, BD
        )
        if scores is not None:
            tl.store(scores[:, None] + cols[None, :], s, mask=both)
        if weights is not None:
            seen = seen_keys(mask, at, cols, inside, window, S, mask_s, CAUSAL, WINDOWED) & alive[:, None]
            # Chosen, not multiplied: what is hidden may be no number.
            w = tl.where(seen, tl.exp(s - shift[:, None]) * inverse[:, None], 0.0)
            tl.store(weights[:, None] + cols[None, :], w.to(weights.dtype.element_ty), mask=both)


@triton.jit
def _write_zeros(weights, cols, inside, S, BM: tl.constexpr, BN: tl.constexpr):
    """Weights of keys that no row sees."""
    both = inside[:, None] & (cols < S)[None, :]
    tl.store(weights[:, None] + cols[None, :], tl.full([BM, BN], 0, weights.dtype.element_ty), mask=both)
