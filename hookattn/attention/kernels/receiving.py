"""The GPU kernel of the statistic that is a number for each key: what it receives from all queries.

Letters as in :mod:`.rows`. The sweep is transposed: keys are rows here, and queries columns. Each program keeps some
keys and goes over the queries, so that nobody else adds to the same sum. The other way round every program would add to
all keys, by atomic additions, whose order, and with it the last digits, would be other in every run. A weight is known
at once, as the denominators of all queries were written by :func:`.summing.sum_rows` before.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from .rows import allows, unmasked
from .summing import scores_in_log2


@triton.jit
def _sweep(
    found, first, last, keys, q, product, scale, bias, mask, level, rows, key, inside, factor, softcap, offset, window,
    T, D, q_t, q_d, product_t, scale_t, bias_t, mask_t,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Some more queries in the sums of BM keys; EDGE: there may be some among them that don't see some key."""
    for begin in range(first, last, BN):
        t = begin + tl.arange(0, BN)
        log = tl.load(
            level + t, mask=t < T, other=float("inf")
        )  # 2 to the power of −∞: no weights beyond the last query
        x = scores_in_log2(
            keys, q, product, scale, bias, t, inside, factor, softcap, T, D, q_t, q_d, product_t, scale_t, bias_t, BD
        )
        mass = tl.exp2(x - log[None, :])
        if EDGE:
            seen = unmasked(mask, t, inside, T, mask_t)
            if CAUSAL or WINDOWED:
                at = t
                if rows is not None:
                    at = tl.load(rows + t, mask=t < T, other=0)
                at = (at + offset).to(tl.int32)
                seen &= allows(at[None, :], key[:, None], window, CAUSAL, WINDOWED)
            mass = tl.where(seen, mass, 0.0)
        found += tl.sum(mass, 1)
    return found


@triton.jit(do_not_specialize=["offset", "window"])
def receive_keys(
    q,  # B H T D
    k,  # B G S D
    product,  # B H T S: finished scores, instead of q and k; or None
    level,  # B H T, contiguous, float32: log₂ of the softmax's denominator
    spans,  # 4, key blocks, int64: the first block of queries that may see some key, that all see, and where these end
    received,  # B H S, contiguous, float32
    scale,  # to B H T S, or None
    bias,
    mask,  # int8
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
    q_b, q_h, q_t, q_d, k_b, k_g, k_s, k_d, product_b, product_h, product_t, product_s,
    scale_b, scale_h, scale_t, scale_s, bias_b, bias_h, bias_t, bias_s, mask_b, mask_h, mask_t, mask_s,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """BM keys of one head, in one sweep over the queries that see any of them."""
    blocks = (S + BM - 1) // BM
    z = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = z // H, z % H
    block = tl.program_id(0) % blocks
    key = block * BM + tl.arange(0, BM)
    inside = key < S
    far = key.to(tl.int64)

    keys = None
    if product is None:
        d = tl.arange(0, BD)
        keys = k + b * k_b + (h // per) * k_g + far[:, None] * k_s + d[None, :] * k_d
        keys = tl.load(keys, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        q += b * q_b + h * q_h
    else:
        product += b * product_b + h * product_h + far * product_s
    if scale is not None:
        scale += b * scale_b + h * scale_h + far * scale_s
    if bias is not None:
        bias += b * bias_b + h * bias_h + far * bias_s
    if mask is not None:
        mask += b * mask_b + h * mask_h + far * mask_s
    level += z * T

    first, left, right, last = 0, 0, T, T
    if CAUSAL or WINDOWED:
        first = tl.load(spans + block).to(tl.int32) * BN
        left = tl.load(spans + blocks + block).to(tl.int32) * BN
        right = tl.load(spans + 2 * blocks + block).to(tl.int32) * BN
        last = tl.load(spans + 3 * blocks + block).to(tl.int32) * BN
    found = tl.full([BM], 0, tl.float32)
    if mask is not None:
        left = last
    if CAUSAL or WINDOWED or mask is not None:
        found = _sweep(
            found, first, left, keys, q, product, scale, bias, mask, level, rows, key, inside, factor, softcap,
            offset, window, T, D, q_t, q_d, product_t, scale_t, bias_t, mask_t, True, CAUSAL, WINDOWED, BN, BD,
        )  # fmt: skip
    if mask is None:
        found = _sweep(
            found, left, right, keys, q, product, scale, bias, mask, level, rows, key, inside, factor, softcap,
            offset, window, T, D, q_t, q_d, product_t, scale_t, bias_t, mask_t, False, CAUSAL, WINDOWED, BN, BD,
        )  # fmt: skip
        if WINDOWED:
            found = _sweep(
                found, right, last, keys, q, product, scale, bias, mask, level, rows, key, inside, factor, softcap,
                offset, window, T, D, q_t, q_d, product_t, scale_t, bias_t, mask_t, True, CAUSAL, WINDOWED, BN, BD,
            )  # fmt: skip
    tl.store(received + z * S + key, found, mask=inside)
